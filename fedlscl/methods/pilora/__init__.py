"""PILoRA (Guo et al., 2024): a LoRA of its own for each task, orthogonal to the earlier ones, and learnable prototypes.

See docs/methods/pilora.md. One block of the frozen ViT is adapted: q and v of its qkv map have a pair A_n, B_n for task
n, and the sum of all tasks' B_s A_s counts. The logits are -delta, delta_c the distance of the feature to the prototype
of class c. Objective, for task n:

    CE(-delta, y; all K) + compactness * mean of delta_y + sparsity (||A_q,n||_1 + ||A_v,n||_1)
        + orthogonality * sum over s < n and both parts of ||A_n A_s^T||_1.

Aggregation: the pair is averaged, by the clients' training images. A class's prototype is the mean of its copies under
the weights softmax(r / temperature), r the larger, the nearer a copy is to the clients' mean features of the class.

What travels: up the current pair, prototypes and class means of the current classes and their numbers; down the pair
and these prototypes. The server learns which classes a client trains now.

Logged: collaborate/cross_entropy, collaborate/compactness, collaborate/sparsity, collaborate/orthogonality.
"""
