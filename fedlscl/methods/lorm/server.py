"""The server of LoRM: it keeps the common A, and merges the factor whose turn it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from fedlscl.checks import fraction
from fedlscl.memory import above, below
from fedlscl.messages import MessageError, Schema, Upload
from fedlscl.methods.lorm.client import LAYERS, LoRMClient, initial, turn
from fedlscl.methods.lorm.merging import merge, projected, shrunk
from fedlscl.server import Answer, Answers, Context, Metrics, Server


class LoRMServer(Server):
    """Merges the factor whose turn it is in closed form.

    Args:
        alpha: how much of the head's Gram matrix outside its diagonal counts.
    """

    serves, needs = "LoRMClient", ("gram",)

    def __init__(self, alpha: float = 0.5) -> None:
        super().__init__()
        fraction("server", alpha=alpha)
        self.alpha = alpha

    def begin(self, uploads: Schema, downloads: Schema, model: Callable[[], nn.Module]) -> None:
        """The common A is that of the common start."""
        super().begin(uploads, downloads, model)
        body = model()
        assert isinstance(body, LoRMClient)
        self.origin = int(body.origin)
        self.a = {layer: a.detach().clone() for layer, a in zip(LAYERS, body.a, strict=True)}
        self.merges = 0

    def check(self, upload: Upload) -> None:
        """The factor whose turn it is, and it alone."""
        which = turn(self.merges)
        wanted = {f"{which}.{layer}" for layer in LAYERS}
        if {name for name in upload.tensors if name.startswith(("a.", "b."))} != wanted:
            raise MessageError(f"upload: this round is for the factor {which} of all layers, and for no other")

    def state(self) -> dict[str, Tensor]:
        """The common A, and the rounds of the current task so far."""
        return {"merges": torch.tensor(self.merges), **above(self.a, "a.")}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over both."""
        self.merges, self.a = int(state["merges"]), below(state, "a.")

    def aggregate(self, uploads: Mapping[int, Upload], context: Context) -> tuple[Answers, Metrics]:
        """The merged factor and head for everyone, absent clients included, and at a task's end its Gram diagonals."""
        which = turn(self.merges)
        grams = {layer: torch.zeros((), dtype=torch.float64) for layer in LAYERS}

        def sent() -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
            for upload in uploads.values():
                tensors, found = upload.tensors, {}
                for layer in LAYERS:
                    gram = tensors[f"gram.{layer}"].double()
                    grams[layer] = grams[layer] + gram
                    seen = gram if which == "a" else projected(self.a[layer], gram)
                    found[f"{which}.{layer}"] = tensors[f"{which}.{layer}"], seen
                found["head.weight"] = tensors["head.weight"], shrunk(tensors["gram.head"], self.alpha)
                # to a bias the input is 1, and so its Gram matrix the number of images
                found["head.bias"] = tensors["head.bias"][:, None], torch.tensor([float(upload.samples)])
                yield found

        merged = merge(sent())
        merged["head.bias"] = merged["head.bias"].squeeze(1)
        answer = above(merged, "merged.")
        self.merges += 1
        if which == "a":
            self.a = {layer: merged[f"a.{layer}"] for layer in LAYERS}
        if context.round.ends_task:
            answer |= {f"gram.{layer}": gram.float() for layer, gram in grams.items()}
            self.a = {
                layer: initial(a.shape, self.origin, context.round.task + 1, layer) for layer, a in self.a.items()
            }
            self.merges = 0
        return dict.fromkeys(range(context.clients), Answer(answer)), {}
