"""The federation: Algorithm 1, the machines that clients live on, messages on their way, and states on the disk."""
