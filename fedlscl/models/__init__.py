"""The frozen ViT and the small CNN of every client, what is injected into the ViT, and a cache of what it computes."""
