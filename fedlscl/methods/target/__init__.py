"""TARGET (Zhang et al., 2023): when a task ends, the server inverts the global model into images for replay.

A generator without data makes images that the global model takes for the classes learned so far. Clients get them with
the model, note the logits that this model, the teacher z^T, gives them, and distil these while they learn what comes.

Objective, with C(i, n) the classes of the current task (`train_mask: task`) and Old those that any client had learned
when the images were made: CE(z, y; C(i, n)) on the current images in the first task; later + `strength` KD, where

    KD = - mean over b of the sum over c in Old of softmax(z^T / 2)_c log softmax(z / 2)_c

over as many synthetic images, drawn anew in each step. Both softmaxes run over Old alone; there is no factor T^2. The
published strength is 25 (under SGD 0.01, momentum 0.9, decay 5e-4; here Adam, as for every method).

Aggregation: the uniform mean. After the last round of every task (of the last one too, since the server does not
know how many follow) the server replaces the synthetic images. Its generator takes z in R^256 by a linear map to
128 x (s/4)^2, by two stages of doubling, convolution, batch normalisation and LeakyReLU to 64 x s^2, and by a
convolution and a sigmoid to an image of s px. It is new for each task. In each of `synthesis_rounds` rounds targets t
are drawn uniformly from Old; a copy of the generator (Adam, `generator_rate`) and a z of its own for each of
`batch_size` images (`latent_rate`) take `steps` steps down

    L = 10 L_BN + 0.5 CE(teacher(aug(x)), t; Old) + 1.0 L_adv
    L_BN = sum over batch normalisations of ||var_run - var||_2 + ||mu_run - mu||_2
    L_adv = - mean over b of [student and teacher predict the same] KL(teacher || student)

and the batch of lowest L is kept. In L_BN the batch's mean and variance count for 0.1 and their running mixture over
the earlier rounds for 0.9. The generator then makes one step of Adam at `generator_rate` times `steps`: against the
sum of the copy's gradients (`meta: maml`, of first order) or towards where the copy went (`reptile`). A student,
re-initialised for each task, learns from the teacher on the images so far (KL at T = `student_temperature`, times
T^2; `student_steps` steps of SGD at `student_rate`) after each round from number `warm_up` on, and L_adv counts in the
rounds after that. **With the published 10 rounds and a warm-up of 20 neither ever happens**, and there are 2,560
images. For larger images the published code has 200 rounds of 50 steps, weights 0.1 for L_BN and CE, `generator_rate`
2e-4, `student_temperature` 5 and `meta: reptile`. The defaults here are those for CIFAR, but for CPUs
experiments/methods/target.yaml sets `batch_size` to 24: `--server.init_args.batch_size 256` is the published one.

The images have s = `gen_size` px, but never more than the CNN takes (and a multiple of 4), and are enlarged like all
images, by bicubic interpolation. At 224 px the generator's first layer would have 103 million numbers and a published
set of 8,000 images 1.2 GB; at the default 64 px it is 98 MB. A CNN without batch normalisation, such as that of the
small settings, has L_BN = 0: then nothing but the classes holds the images to what was learned from.

What travels: up CNN and head as with FedAvg, and a mask of the classes that this client has learned, K bytes more. From
it the server, which needs it for Old, gets to know which classes a client has. Down CNN and head; after the last round
of a task also N uint8 images and Old, 3 N s^2 + K bytes more, to everyone, absent or not.

What the client keeps on its disk: these images, 3 N s^2 bytes, the teacher's N |Old| logits in float32, computed once
before the model is first evaluated, and Old; no second model.

Ours, where neither publication nor code fits or was followed: Old and the restriction of CE, KL and predictions to it
(the heads here have rows for classes that nobody has learned); aug is a shift by up to s/8 px, with zeros around, and
a flip in half of the cases; the images of a step pass the client's network apart from the real ones; plain SGD.

Logged: collaborate/cross_entropy, collaborate/distillation (25 KD); after the last round of a task, as means over the
kept batches, server/statistics (10 L_BN), server/cross_entropy (0.5 CE), server/adversarial (1.0 L_adv) and
server/recognised (share that the teacher takes for its target).
"""
