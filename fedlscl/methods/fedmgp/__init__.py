"""FedMGP (Yu et al., 2024): a coarse prompt fused by the server, fine prompts for each class that stay with the client.

See docs/methods/fedmgp.md. With q the frozen ViT's own feature of an image, f its features under the global prompt P
alone, f_c those under P and the prefixes of class c, kappa the keys and G and H the global and the local head, each
round has two phases on the images of the current task n of client i, whose classes are C(i, n):

    global, moves P, kappa and G:              CE(G(f); C(i, n)) - lambda cos(q, kappa)
    local, moves the slots, their keys and H:  CE(H(f_y); C(i, n)) - lambda cos(f, kappa_y).

Aggregation (`fusion: distil`): one prompt, distilled from those of all clients on labelled images of the server's own,
and a head trained on these images under it; keys are averaged. `client0` hands everyone the first client's prompt.

What travels: P, kappa and G, both ways; under `client0` down without G. Slots, their keys and local heads stay.

Logged: global/cross_entropy, global/pull, local/cross_entropy, local/pull; server/fusion_before, server/fusion_after,
server/head.
"""
