"""Heads in closed form: sums over all images of a frozen ViT's features, and no gradient.

See docs/methods/statistics.md. Nothing is optimised by steps: client i sends sums over its images of a task, once, and
the server solves for a linear head from the sums of all clients and tasks. With f the feature (d) of the frozen ViT,
or h = relu(f R) with a random R (d, `projection`), and sums over all images x of class c:

    ClassMeans        n_c, s_c = sum of h            w_c = s_c / |s_c|
    Ridge             s_c, G = sum of [h; 1][h; 1]^T  W = (G + strength I)^-1 S
    ClassCovariances  n_c, s_c of each client        the same with G estimated from how the clients' means differ

Aggregation: a sum. h is rounded to multiples of 2^-12 and summed in float64, which makes the sums exact: neither the
order of clients nor that of tasks changes a bit of them.

What travels: up these sums, in the first round of a task; down the head.

Logged: server/images, server/strength.
"""
