"""GLFC (Dong et al., 2022): exemplars under rebalanced losses, and a proxy server that picks the teacher.

See docs/methods/glfc.md. **The server reconstructs images of the clients, by design.** Objective, with S the classes
seen, omega_b = g_b / mean of g over the learned or the new samples, g_b = 1 - sigmoid(z_b)[y_b], and t the teacher's
sigmoids for learned classes, else [c = y_b]:

    L_GC / 2 + L_RD / 2,  L_GC = mean over b and c in S of omega_b BCE(z_bc, [c = y_b]),  L_RD = mean BCE(z_bc, t_bc).

Aggregation: the uniform mean. The proxy fits images to the gradients of prototypes, and of the means it keeps the one
that is most accurate on them, which becomes the teacher.

What travels: up the model, at the start of a task also a gradient of P = 8,136 + 769 K numbers for each of its classes;
down the model, and each teacher in rounds in which it has changed.

Logged: collaborate/compensation, collaborate/relation (both halved with a teacher), detection/entropy; server/score
(accuracy in % on the reconstructed images), server/mismatch (squared distance of the gradients).
"""
