"""The server of FedWeIT: the mean of the channels that were sent, and the knowledge base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from fedlscl.memory import above, below
from fedlscl.messages import MessageError, Schema, Upload
from fedlscl.methods.fedweit.decomposition import join, per_channel
from fedlscl.server import Answer, Answers, Context, Metrics, OnDemand, Server


class FedWeITServer(Server):
    """Averages what was sent of W, and at the end of a task hands everyone the A of all others."""

    serves, needs = "FedWeITClient", ("adaptive",)

    def begin(self, uploads: Schema, downloads: Schema, model: Callable[[], nn.Module]) -> None:
        """W is what all clients take back."""
        super().begin(uploads, downloads, model)
        self.names = tuple(name for name, spec in downloads.items() if not spec.optional)
        (self.entries,) = uploads["adaptive.places"].largest

    def check(self, upload: Upload) -> None:
        """As many channels as are said to be kept, and of A as many values as places, which there are."""
        sent = upload.tensors
        for name in self.names:
            if int(sent[f"{name}.kept"].sum()) != len(sent[name]):
                raise MessageError(f"upload: '{name}' has not as many channels as '{name}.kept' says")
        adaptive = below(sent, "adaptive.")
        if len(adaptive) == 1:
            raise MessageError("upload has 'adaptive.places' or 'adaptive.values' without the other")
        if not adaptive:
            return
        places = adaptive["places"]
        ascending = bool((places.diff() > 0).all())
        within = places.min() >= 0 and places.max() < self.entries
        if len(places) != len(adaptive["values"]) or not within or not ascending:
            raise MessageError(
                f"upload: 'adaptive.places' must be a number from 0 to {self.entries - 1} for each of "
                "'adaptive.values', ascending"
            )

    def aggregate(self, uploads: Mapping[int, Upload], context: Context) -> tuple[Answers, Metrics]:
        """One W for all clients, absent ones included, and to each the others' A."""
        adaptives: dict[int, Mapping[str, Tensor]] = {}

        def channels() -> Iterable[dict[str, tuple[Tensor, Tensor]]]:
            for index, upload in uploads.items():
                sent = upload.tensors
                if adaptive := below(sent, "adaptive."):
                    adaptives[index] = adaptive
                yield {name: (sent[name], sent[f"{name}.kept"]) for name in self.names}

        merged = merge(channels())

        def answer(index: int) -> Answer:
            others = [part for other, part in adaptives.items() if other != index]
            if not others:
                return Answer(merged)
            return Answer({**merged, **above(join(others), "others.")})

        return OnDemand(range(context.clients), answer), {}


def merge(clients: Iterable[Mapping[str, tuple[Tensor, Tensor]]]) -> dict[str, Tensor]:
    """Channel by channel the mean over the clients that sent it, summed up in float64; zeros where nobody did.

    Args:
        clients: of each client by name the channels that it sent (kept, ...) and which they are (c,). Gone through
            once.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for client in clients:
        for name, (channels, kept) in client.items():
            if name not in sums:
                sums[name] = torch.zeros(len(kept), *channels.shape[1:], dtype=torch.float64)
                counts[name], dtypes[name] = torch.zeros(len(kept)), channels.dtype
            sums[name][kept] += channels
            counts[name] += kept
    return {n: (s / per_channel(counts[n].clamp(min=1), s)).to(dtypes[n]) for n, s in sums.items()}
