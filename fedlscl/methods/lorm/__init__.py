"""LoRM (Salami et al., 2025): LoRA factors trained one at a time, so that merging them has a closed form.

See docs/methods/lorm.md. Every linear map of every block of the frozen ViT gets a LoRA, W_0 + B A, new for each task.
Clients train B in the odd rounds of a task and A in the even ones, and have the other factor in common. Objective, with
C(i, n) the classes of client i's current task: CE(z, y; C(i, n)), z under the current task's factors alone.

Aggregation, with G_i the diagonal of the sum of x x^T over all tokens that enter a map, H_i the whole sum for the head:

    B <- (sum B_i A G_i) A^T (A (sum G_i) A^T)^+,    A <- (sum A_i G_i) (sum G_i)^+,
    head weight <- (sum W_i H'_i) (sum H'_i)^+, H' = alpha H + (1 - alpha) diag(H),    head bias <- sum p_i b_i.

What travels: up B or A, G_i, the head, H_i; down the merged factor and the head, at a task's end also sum G_i.

Logged: collaborate/cross_entropy.
"""
