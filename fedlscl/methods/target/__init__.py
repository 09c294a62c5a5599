"""TARGET (Zhang et al., 2023): when a task ends, the server inverts the global model into images to distil on.

See docs/methods/target.md. Objective, with C(i, n) the classes of the current task, Old those that any client had
learned when the images were made, and z^T the logits of the model that came with them: CE(z, y; C(i, n)) on the
current images, later + `strength` KD on as many synthetic ones,

    KD = - mean over b of the sum over c in Old of softmax(z^T / 2)_c log softmax(z / 2)_c.

Aggregation: the uniform mean; after each task it is inverted: a generator learns to make batches of lowest
10 L_BN + 0.5 CE(teacher(aug(x)), t; Old) + 1.0 L_adv, t drawn from Old, L_BN the distance to the statistics of batch
normalisation, L_adv = - KL(teacher || student) where both predict the same.

What travels: up CNN, head and a mask of the classes learned; down CNN and head, after a task also N uint8 images of
s px and Old, 3 N s^2 + K bytes, to everyone.

Logged: collaborate/cross_entropy, collaborate/distillation; after a task, weighted, server/statistics,
server/cross_entropy, server/adversarial, and server/recognised (share that the teacher takes for its target).
"""
