"""FedViT with a head that is averaged row by row.

See docs/methods/row_average.md. Objective as in FedAvg. Aggregation: row c is averaged by the images of class c alone,

    w_c <- sum over i of n_ic w_ic / sum over i of n_ic,

n_ic the images of class c on which client i trained in this round. A row whose class nobody trained stays the plain
mean.

What travels: the head, both ways, and from each client n_ic for all K classes. The server thereby learns which classes
a client has, and how many images of each.

Logged: collaborate/cross_entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from fedlscl.continual import NoReplay
from fedlscl.memory import above, below
from fedlscl.messages import MessageError, Schema, TensorSpec, Upload, not_negative, schema_of
from fedlscl.methods.frozen_vit import FrozenViTClient
from fedlscl.server import Answer, Answers, Context, FedAvg, Metrics, Total

COUNTS = "class_counts"


class CountingFrozenViTClient(FrozenViTClient):
    """`FrozenViTClient`, which also says how many images of each class it trained on; for the settings see there."""

    required = (("continual", NoReplay),)  # only current images are counted

    def outgoing(self) -> dict[str, Tensor]:
        """What is shared, and the images of each class (K,)."""
        return {**self.shared(), COUNTS: torch.bincount(self.data.labels(self.current), minlength=self.num_classes)}

    def upload_schema(self) -> Schema:
        """What is shared, and a number for each class."""
        return {**schema_of(self.shared()), COUNTS: TensorSpec((self.num_classes,), torch.int64, rule=not_negative)}


class RowAverage(FedAvg):
    """FedAvg, but for the tensors that have a row for each class.

    Args:
        rows: names of the tensors that are averaged row by row.
        weighting: how the others are averaged, see `FedAvg`.
    """

    serves, needs = "CountingFrozenViTClient", (COUNTS,)

    def __init__(self, rows: list[str], weighting: Literal["samples", "uniform"] = "samples") -> None:
        super().__init__(weighting)
        self.rows = rows

    def begin(self, uploads: Schema, downloads: Schema, model: Callable[[], nn.Module]) -> None:
        """Only for tensors with as many rows as there are classes."""
        super().begin(uploads, downloads, model)
        for name in self.rows:
            if name not in self.names or uploads[name].shape[:1] != uploads[COUNTS].shape:
                fitting = [n for n in self.names if uploads[n].shape[:1] == uploads[COUNTS].shape]
                raise ValueError(f"server.rows names '{name}', must name tensors with a row for each class: {fitting}")

    def check(self, upload: Upload) -> None:
        """The counts are those of the images behind the upload."""
        if (counted := int(upload.tensors[COUNTS].sum())) != upload.samples:
            raise MessageError(f"upload: '{COUNTS}' adds up to {counted} images, of {upload.samples}")

    def aggregate(self, uploads: Mapping[int, Upload], context: Context) -> tuple[Answers, Metrics]:
        """One mean for all clients."""
        answers, metrics = super().aggregate(uploads, context)
        mean = dict(answers[0].tensors)
        mean |= row_means({name: mean[name] for name in self.rows}, [upload.tensors for upload in uploads.values()])
        return dict.fromkeys(answers, Answer(mean)), metrics

    def terms(self, upload: Upload) -> Mapping[str, Tensor]:
        """What FedAvg adds up, n_ic, and n_ic w_ic."""
        counts = upload.tensors[COUNTS].double()
        rows = {name: _by_row(counts, upload.tensors[name]) * upload.tensors[name].double() for name in self.rows}
        return {**super().terms(upload), COUNTS: counts, **above(rows, "rows.")}

    def factors(self, images: int) -> Mapping[str, int]:
        """Also each row, by the images of its class."""
        return {**super().factors(images), **above(dict.fromkeys(self.rows, images), "rows.")}

    def from_sums(self, total: Total, context: Context) -> tuple[Answers, Metrics]:
        """One mean for all clients, from sums alone."""
        answers, metrics = super().from_sums(total, context)
        mean, counts = dict(answers[0].tensors), total.tensors[COUNTS]
        for name, rows in below(total.tensors, "rows.").items():
            of_class = (rows / _by_row(counts.clamp(min=1), rows)).to(mean[name].dtype)
            mean[name] = torch.where(_by_row(counts > 0, rows), of_class, mean[name])
        return dict.fromkeys(answers, Answer(mean)), metrics


def _by_row(values: Tensor, rows: Tensor) -> Tensor:
    """Values (K,), one for each row of `rows` (K, ...), so that they can be multiplied."""
    return values.reshape(-1, *[1] * (rows.ndim - 1))


def row_means(plain: Mapping[str, Tensor], models: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Average row c of each tensor by the images of class c.

    Args:
        plain: tensors (K, ...) by name, whose rows are kept for classes that nobody has.
        models: each client's tensors of these names, and under ``class_counts`` its images of each class (K,).

    Returns:
        The means, in the shapes and dtypes of `plain`.
    """
    # a count below zero cannot be, but a client may send it
    counts = torch.stack([model[COUNTS].clamp(min=0) for model in models]).double()
    held = counts.sum(0) > 0
    shares = counts[:, held] / counts[:, held].sum(0)
    means = {}
    for name, tensor in plain.items():
        rows = torch.stack([model[name][held] for model in models]).double()
        means[name] = tensor.clone()
        means[name][held] = torch.einsum("ic,ic...->c...", shares, rows).to(tensor.dtype)
    return means
