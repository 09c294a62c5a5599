"""MFCL (Babakniya et al., 2023): when a task ends, the server trains a generator on the global model, for replay.

The generator sees no data: it learns to make images that the global model takes for the classes learned so far. Clients
get it with the model and, while they learn what comes, replay fresh samples of it in every step, with that model as
the teacher.

Objective, with C(i, n) the classes of the current task (`train_mask: task`): CE(z, y; C(i, n)) on the current images
x; from the second task on, with Old the classes that any client had learned when the generator was trained, also

    + `head_weight` CE(H(sg f(x')), y'; Old and C(i, n)), sg: no gradient, so that only the head H learns from it
    + `distillation_weight` mean ||h_old(f(x')) - h_old(f_old(x'))||^2 / |Old|

over x', the current images and `samples` images of the generator, drawn anew in each step. y' is the label of a
current image, and for a generated one the class of Old that the teacher prefers; h_old are the rows of the teacher's
head for Old, frozen. The published weights are 1 and 0.1, under SGD from 0.1 to 0.01, 10 epochs of batches of 32 and
100 rounds; here Adam, as for every method.

Aggregation: the uniform mean. After the last round of every task (of the last one too, since the server does not
know how many follow) the generator goes on from where it stopped, with a new Adam, `steps` steps of `batch_size`
images down

    L = CE(z / `temperature`, argmax z; Old)
      + `balance` [1 + sum over c in Old of p_c ln p_c / ln |Old|],  p the batch's mean of softmax(z; Old)
      + `statistics` / L_BN sum over batch normalisations of KL(N(mu_run, var_run) || N(mu, var)), mean over channels
      + `smoothness` MSE(x, blur(x))

with the published 1000, 1, 50 and 1e-3, 100 steps, 128 images. blur is 5 x 5 with weights exp(-d^2 / 4), edges
reflected. A temperature of 1000 makes the first term about ln |Old| whatever the images are: the balance and the
statistics decide. **A CNN without batch normalisation, such as that of the small settings, has no statistics**: then
the images need only spread over the classes, and look like nothing. The second term is 0 for a single class.

The generator is linear in z ~ N(0, I_1000), to 128 x (s/4)^2, then by doubling and convolution to 128 and 64 x s^2
and to 3 x s^2 (the published one for CIFAR, up to 32 px: 8.42 million parameters), at 64 px from 128 x (s/8)^2 by one
stage more (Tiny ImageNet), above that from 64 x (s/32)^2 by five stages of 64 (at 224 px 3.33 million). Its output, by
tanh and a batch normalisation without weights, is in the CNN's normalised space; x std + mean makes pixels of it, not
clamped to 0..1, which the small model turns back into the very x. The inner normalisations add 0.8 to the variance, as
published. Clients use it in evaluation mode, as the published code does: a sample then depends on its own z alone and
drawing changes nothing; its running statistics lag some ten steps behind, which matters with few steps.

What travels: up CNN and head as with FedAvg, and a mask of the classes of this client's current task, K bytes more.
From it the server, which needs it for Old, gets to know which classes a client has. Down CNN and head; after the last
round of a task also Old (K bytes) and the generator, to everyone, absent or not. The teacher is the model in the same
download, so it does not travel twice. A generator has 4 (P + 2 C) + 8 B bytes, with P parameters, B batch
normalisations over C channels in all: 33,698,372 bytes at 32 px, 13,308,252 at 224 px.

What the client keeps on its disk: Old, the generator, and the teacher, as large as its own model.

What to expect: a class that only absent clients hold is in Old, but its row was averaged with those of clients that
never trained it; the teacher's argmax is unreliable there, and so are y' and the balance. 100 steps are few at 224 px.

Ours, where neither publication nor code fits or was followed: Old is the union over clients whose tasks have other
classes (published: tasks are the same for all), so a class can be new to one client and old to another; current and
generated images pass the networks one after the other, not as one batch, so batch normalisation normalises each by
itself; in the KL the layer's own epsilon is added to both variances. The file experiments/methods/mfcl.yaml has a
smaller budget, for CPUs: take its lines out for the published one.

Logged: collaborate/cross_entropy, collaborate/head and collaborate/distillation (weighted); after the last round of a
task, of the generator's last step, server/cross_entropy, server/balance, server/statistics, server/smoothness
(weighted) and server/shown (share of Old that the teacher sees in the batch).
"""
