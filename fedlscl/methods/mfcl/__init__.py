"""MFCL (Babakniya et al., 2023): when a task ends, the server trains a generator on the global model, for replay.

See docs/methods/mfcl.md. Objective, with C(i, n) the classes of the current task, Old those that any client had learned
when the generator was trained, and x' the current and `samples` generated images, which the teacher labels:

    CE(z, y; C(i, n)) on current images + `head_weight` CE(H(no gradient f(x')), y'; Old and C(i, n))
    + `distillation_weight` mean ||h_old(f(x')) - h_old(f_old(x'))||^2 / |Old|.

Aggregation: the uniform mean; after each task the generator goes on from where it stopped, down CE(z / `temperature`,
argmax z; Old) + `balance` [1 - entropy of the mean prediction / ln |Old|] + `statistics` KL to what batch normalisation
met in training + `smoothness` MSE(x, blur(x)).

What travels: up CNN, head and a mask of the current task's classes; down CNN and head, after a task also Old and the
generator (33.7 MB at 32 px, 13.3 MB at 224 px), to everyone.

Logged: collaborate/cross_entropy, collaborate/head, collaborate/distillation; after a task, of the last step and
weighted, server/cross_entropy, server/balance, server/statistics, server/smoothness, and server/shown (share of Old).
"""
