"""The gradients that GLFC's clients send of their prototypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlscl import seeds

SIDE = 32  # of the images that the encoding net takes, in pixels
FEATURES = 12 * (SIDE // 4) ** 2  # that its last layer sees


def encoding_net(classes: int) -> nn.Sequential:
    """The network whose gradients are shared, (B, 3, 32, 32) to (B, K): the same for everyone and in every run."""
    with seeds.seeded(0, "glfc encoding net"):
        maps = [nn.Conv2d(channels, 12, 5, stride, padding=2) for channels, stride in ((3, 2), (12, 2), (12, 1))]
        layers = (layer for convolution in maps for layer in (convolution, nn.Sigmoid()))
        net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(FEATURES, classes))
        for parameter in net.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
    return net


def encoded(net: nn.Module, image: Tensor, label: Tensor, differentiable: bool = False) -> Tensor:
    """The gradient (P,) of the cross-entropy of an image (1, 3, 32, 32) with label (1,) in all weights of a network."""
    with torch.autocast(image.device.type, enabled=False):
        loss = F.cross_entropy(net(image), label)
        parts = torch.autograd.grad(loss, list(net.parameters()), create_graph=differentiable)
    return torch.cat([part.flatten() for part in parts])


def labels_of(gradients: Tensor, classes: int) -> Tensor:
    """The labels (n,) behind gradients (n, P): the sum over a row of the last layer is negative for the label alone."""
    last = gradients[:, -classes * (FEATURES + 1) : -classes]  # its weight, between the other layers and its bias
    return last.reshape(-1, classes, FEATURES).sum(dim=2).argmin(dim=1)
