"""The server of heads in closed form: it adds up, and solves.

Shapes: K classes, p features that the head sees.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fedlscl.messages import MessageError, Schema, Upload
from fedlscl.methods.statistics.client import StatisticsClient
from fedlscl.methods.statistics.heads import ClosedFormHead, added, as_message
from fedlscl.server import Answer, Answers, Context, Metrics, Server, Total


class StatisticsServer(Server):
    """Adds up what clients send, by client where the head needs that, and solves for the head when there is more."""

    serves, needs = "StatisticsClient", ("class_sums",)

    def begin(self, uploads: Schema, downloads: Schema, model: Callable[[], nn.Module]) -> None:
        """The clients' head says what follows from the sums."""
        super().begin(uploads, downloads, model)
        client = model()
        assert isinstance(client, StatisticsClient)
        self.expect(client.head, uploads)

    def expect(self, head: ClosedFormHead, uploads: Schema) -> None:
        """Hear how a head follows from the sums that look like this."""
        self.head = head
        self.shapes = {name: spec.largest for name, spec in uploads.items()}
        self.sums: dict[int, dict[str, Tensor]] = {}

    def check(self, upload: Upload) -> None:
        """All sums or none, and over as many images as there are."""
        if not upload.tensors:
            return
        if missing := sorted(set(self.shapes) - set(upload.tensors)):
            raise MessageError(f"upload: has {sorted(upload.tensors)} without {missing}")
        if problem := self.head.problem(upload.tensors, upload.samples):
            raise MessageError(f"upload {problem}")

    def state(self) -> dict[str, Tensor]:
        """The sums over all rounds."""
        return {f"{client}.{name}": tensor for client, sums in self.sums.items() for name, tensor in sums.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take them over."""
        self.sums = defaultdict(dict)
        for key, tensor in state.items():
            client, _, name = key.partition(".")
            self.sums[int(client)][name] = tensor

    def aggregate(self, uploads: Mapping[int, Upload], context: Context) -> tuple[Answers, Metrics]:
        """The same head for all clients, or no answer where nobody sent anything new."""
        new = False
        for client, upload in uploads.items():
            if upload.tensors:
                new, key = True, client if self.head.by_client else 0
                self.sums[key] = added([self.sums.get(key, {}), upload.tensors])
        return self.answers(context) if new else ({}, {})

    def beyond_sums(self) -> str | None:
        """Some heads need sums by client."""
        by_client = "needs the sums of each client for this model.head" if self.head.by_client else None
        return by_client or super().beyond_sums()

    def terms(self, upload: Upload) -> Mapping[str, Tensor]:
        """The sums, or zeros where a client has nothing new, so that nobody sees that."""
        return upload.tensors or {n: torch.zeros(shape, dtype=torch.float64) for n, shape in self.shapes.items()}

    def from_sums(self, total: Total, context: Context) -> tuple[Answers, Metrics]:
        """The same from the sums over all clients."""
        counts = self.head.counts(total.tensors)
        if not bool(counts.any()):
            return {}, {}
        if problem := self.head.problem(total.tensors, int(counts.sum())):
            raise MessageError(f"the clients' sum {problem}")
        self.sums[0] = added([self.sums.get(0, {}), total.tensors])
        return self.answers(context)

    def answers(self, context: Context) -> tuple[Answers, Metrics]:
        """What follows from the sums so far, the same for all clients."""
        total = added(self.sums.values())
        counts, solution = self.head.counts(total), self.head.solve(self.sums)
        metrics = {**self.head.metrics(total), **solution.metrics}
        return dict.fromkeys(range(context.clients), Answer(as_message(solution, counts))), metrics
