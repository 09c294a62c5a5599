"""GLFC (Dong et al., 2022): exemplars under rebalanced losses, and a proxy server that picks the teacher.

**The server reconstructs images of the clients, by design.** What a client sends of its prototypes is the gradient of a
small network that both sides know, and the proxy inverts it. The images are perturbed before, which keeps them no
secret. Who cannot accept that cannot use GLFC.

Objective on a batch of current images and exemplars, with pr = sigmoid(z), S the classes that the client has seen, and
O and W the samples of its learned and of its new classes:

    g_b = 1 - pr_b[y_b] (no gradient),  omega_b = g_b / mean of g over the group (O or W) of b,
    L_GC = mean over b and c in S of omega_b BCE(z_bc, [c = y_b]),
    L_RD = mean over b and c in S of BCE(z_bc, t_bc),  t = sigmoid(z of the teacher) for learned c, else [c = y_b],
    L = L_GC / 2 + L_RD / 2.

Without a teacher L is L_GC, without a learned class every omega is 1. An epoch goes over exemplars and current images.

*Start of a task.* With `task_detect: oracle` the client signals in its first round of a task. With `entropy` it signals
if H - H_prev > `threshold`, H being the mean over the current images of - sum p ln(p + 1e-5), p the softmax of the
received model over S, and H_prev that of the client's last round (0 before). H is at most ln |S|, 2.08 for 8 classes,
so that few classes need a lower threshold. A task that began without a signal leaves the classes of the last one
neither learned nor replayed until the next signal.

*Exemplars*: floor(`memory_size` / learned classes) of each class, herded on features of unit length. A list is chosen
at the end of the task's last round with the model trained there, so that the images need not outlive their task;
older lists are cut in herding order when it joins them.

*Prototypes.* In a round with a signal the client takes, after training, of each current class the image nearest the
class mean of the unit-length features, moves its pixels by `perturbation_steps` steps of size `perturbation_rate`
against the gradient of the BCE, scales it to 32 x 32, and sends the gradient of the cross-entropy with respect to the
weights of the encoding net: three convolutions (12 channels, 5 x 5, strides 2, 2, 1) with sigmoids and a linear map to
the K classes, its weights from U(-0.5, 0.5), the same in every run, never trained.

Aggregation: w <- mean over i of w_i, uniform. *Proxy*: the label of a gradient is the class whose row of the last layer
has the smallest sum (only that of the true class is negative). From N(0, 1), an image is fitted by L-BFGS to
||its gradient - the gradient||^2; the last `monitors` iterates, cut to 0..1, are monitor images. The averaged model is
scored on them in every round (accuracy among all K classes), and the best is kept, the later one where equal. When
gradients arrive, they replace the monitor images, the kept model becomes the previous best, and the best score starts
from 0. The teacher is the latest best in a round with a signal, otherwise the previous best: as long as all clients
signal together, both are the best model of the task before.

What travels: up the model, 4 (11,176,512 + 513 K + 9,600) + 160 bytes with ResNet-18 and 512 features, and in a round
with a signal `gradients` (c, P), 4 P bytes for each current class, P = 8,136 + 769 K (340,144 bytes with K = 100); no
labels. Down the model, and `teacher.latest.*` and `teacher.previous.*`, another model each, in rounds in which that one
has changed. Everyone gets every answer, and so knows both teachers whenever it comes back.

On the client's disk: the indices of the exemplars, both teachers, and for `entropy` H_prev and the number of tasks
learned.

Where publication and code differ, L_RD is the code's (BCE). Unlike the code: no exemplar twice, and the best score does
start anew with new gradients (there a stale teacher could stay for good). Ours are the columns S (over all K the
private classes of others would be negatives everywhere), in the entropy too; exemplars chosen before the last
download; a prototype perturbed at the CNN's input size and scaled to 32 pixels thereafter (at 224 its gradient would
take 15 MB); no CBAM in the CNN. The code trains with SGD at a rate of 2.0, and perturbs at a tenth of that, which
`perturbation_rate` keeps: a tenth of Adam's rate would not move a pixel. An iteration of L-BFGS is one step of torch's,
of up to 20 inner iterations at `learning_rate`: 250, as in the code, take about 25 seconds of one CPU core for each
gradient. The YAML has 8, and 5 monitors, which leaves the monitor images little more than noise; `--server.iterations
250 --server.monitors 20` gives the published budget.

Defaults from the publication's code: memory_size 2000, threshold 1.2, 50 perturbation steps of 0.2, 250 iterations at
0.1, 20 monitors. Of `Client`'s settings, `buffer_size`, `selection` and `train_mask` have no part in the method.

Logged: collaborate/compensation (L_GC, halved with a teacher), collaborate/relation (L_RD / 2), detection/entropy (H);
server/score (accuracy in % on the monitor images), server/mismatch (squared distance of the gradients as the last
iteration began, mean over those that arrived and did not diverge).
"""
