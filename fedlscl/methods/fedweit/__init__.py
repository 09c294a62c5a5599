"""FedWeIT (Yoon et al., 2021): shared weights under masks, sparse weights of each task, attention to those of others.

See docs/methods/fedweit.md. In task n the convolutions and linear maps of the small model have the weights

    theta_n = W * sigmoid(m_n) + A_n + sum over j of alpha_nj A_j

with W shared by all clients and A_j what others had as A when the task before ended. A client minimises, with C(i, n)
the classes of its current task,

    CE(z, y; C(i, n)) + decay / 2 (||A_n||^2 + ||m_n||^2, and ||W||^2 in the first task) + sparsity ||A_n||_1
        + drift sum over s < n of 1/2 ||W * sigmoid(m_s) + A_s - theta*_s||^2,

theta*_s as it was when task n began. Test images are classified with the parameters of their task.

Aggregation: of each channel of W the mean over the clients that sent it.
What travels: up the channels of W with the largest |m| and which they are, at a task's end also the sparse A_n; down
W, at a task's end also the A_j of all others. Masks, attention, normalisation and head stay.

Logged: collaborate/cross_entropy, collaborate/decay, collaborate/sparsity, collaborate/drift.
"""
