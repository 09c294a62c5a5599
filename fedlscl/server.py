"""The server: uploads of a round in, an answer to every client out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from fedlscl.messages import Schema, Upload
from fedlscl.schedule import Round


class Answer(NamedTuple):
    """What one client gets, and metrics of how it was made, of which the mean over the clients goes on record."""

    tensors: Mapping[str, Tensor]
    metrics: Mapping[str, float] = {}


Answers = Mapping[int, Answer]
"""By client; each is asked for once."""

Metrics = Mapping[str, float]
"""Of one aggregation, by name, for the record."""


@dataclass(frozen=True)
class Context:
    """What a server knows of the round besides the uploads.

    Args:
        clients: number of clients in the federation, absent ones included.
        round: where the federation is.
        trainer: makes a fresh Trainer for each model that the server fits.
    """

    clients: int
    round: Round
    trainer: Callable[[], Trainer]


class OnDemand(Mapping[int, Answer]):
    """Answers of which each is computed when it is asked for, so that there is one in memory at a time.

    Args:
        clients: who gets an answer.
        answer: computes it.
    """

    def __init__(self, clients: Iterable[int], answer: Callable[[int], Answer]) -> None:
        self._clients, self._answer = dict.fromkeys(clients), answer

    def __getitem__(self, client: int) -> Answer:
        """The answer to a client."""
        if client not in self._clients:
            raise KeyError(client)
        return self._answer(client)

    def __contains__(self, client: object) -> bool:
        """Whether a client gets an answer; computes none."""
        return client in self._clients

    def __iter__(self) -> Iterator[int]:
        """All clients that get an answer."""
        return iter(self._clients)

    def __len__(self) -> int:
        """How many they are."""
        return len(self._clients)


class Server(ABC):
    """What every method's server does once a round."""

    listens: ClassVar[bool] = True  # false: nobody uploads anything
    serves: ClassVar[str] = ""  # the client that it is made for, where it cannot serve all
    needs: ClassVar[tuple[str, ...]] = ()  # what such clients send, up to the first dot in the tensors' names
    gives: ClassVar[tuple[str, ...]] = ()  # likewise what they take back

    def __init__(self) -> None:
        self.server_images = 0  # how many labelled training images of each class this server must have of its own

    def begin(self, uploads: Schema, downloads: Schema, model: Callable[[], nn.Module]) -> None:
        """Hear, before any training, what clients will send and take back, and refuse those without what it `needs`.

        Args:
            uploads: what an upload looks like.
            downloads: what a download looks like.
            model: makes an untrained model of the clients, for servers that run one: called with images and an empty
                mapping it gives an `Output`; its tensors bear the names under which they travel.

        Raises:
            ValueError: if the server cannot work with these messages.
        """
        for wanted, schema, how in ((self.needs, uploads, "send"), (self.gives, downloads, "take back")):
            there = {name.partition(".")[0] for name in schema}
            if missing := [name for name in wanted if name not in there]:
                raise ValueError(
                    f"server is {type(self).__name__}, which needs clients that {how} '{missing[0]}', but model does "
                    f"not; take the model {self.serves}, or the server FedAvg"
                )

    def hold(self, images: Tensor, labels: Tensor) -> None:
        """Keep the server's own images, if any are wanted; called once, before any training.

        Args:
            images: (n, 3, H, W) in uint8.
            labels: (n,) class numbers, ascending.
        """
        raise NotImplementedError(f"{type(self).__name__} asks for images of its own and takes none")

    def check(self, upload: Upload) -> None:  # noqa: B027 - for most servers the schema says all
        """Look, as it arrives, at an upload that fits its schema.

        Raises:
            MessageError: if its tensors do not fit one another; the client is then left out of the round.
        """

    def state(self) -> dict[str, Tensor]:
        """Everything of this server that must survive a round, as named tensors on the CPU; nothing by default."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027 - most servers have nothing to remember
        """Take over what `state` returned; called before every round but the first."""

    @abstractmethod
    def aggregate(self, uploads: Mapping[int, Upload], context: Context) -> tuple[Answers, Metrics]:
        """Fuse what the clients sent.

        Args:
            uploads: the valid uploads of this round, by client; at least one. Each access reads one from the disk,
                so a server that goes through them one by one needs no more memory for more clients.
            context: the round, and what the server may use.

        Returns:
            The answer to each client that gets one, and metrics of the aggregation.
        """


class Isolated(Server):
    """No exchange: every client keeps its own model (Table 2 without O2D; local training)."""

    listens = False

    def aggregate(self, uploads: Mapping[int, Upload], context: Context) -> tuple[Answers, Metrics]:
        """Never called."""
        raise NotImplementedError("clients without exchange send nothing to aggregate")


class FedAvg(Server):
    """The mean of the clients' tensors, the same for everyone, absent clients included (McMahan et al., 2017).

    Args:
        weighting: by the number of training `samples`, or `uniform`.
    """

    def __init__(self, weighting: Literal["samples", "uniform"] = "samples") -> None:
        super().__init__()
        self.weighting = weighting

    def begin(self, uploads: Schema, downloads: Schema, model: Callable[[], nn.Module]) -> None:
        """Average what clients take back; of what else they send FedAvg makes no use."""
        super().begin(uploads, downloads, model)
        if not downloads:
            raise ValueError("server: FedAvg has nothing to average, since model shares no tensor; take Isolated")
        self.names = tuple(name for name, spec in downloads.items() if not spec.optional)
        if unknown := sorted(set(self.names) - set(uploads)):
            raise ValueError(f"server: FedAvg averages what clients send, but model wants '{unknown[0]}' back")

    def aggregate(self, uploads: Mapping[int, Upload], context: Context) -> tuple[Answers, Metrics]:
        """One mean for all clients."""
        mean = average(
            (
                {name: upload.tensors[name] for name in self.names},
                upload.samples if self.weighting == "samples" else 1,
            )
            for upload in uploads.values()
        )
        return dict.fromkeys(range(context.clients), Answer(mean)), {}


class Sum(Server):
    """The sum of the clients' tensors, for those with a part in it: all that secure aggregation would let it see.

    What clients send as `x` they get back as `x_sum`, in the same shape and dtype.
    """

    def begin(self, uploads: Schema, downloads: Schema, model: Callable[[], nn.Module]) -> None:
        """Only for clients that expect sums."""
        if downloads != {f"{name}_sum": spec for name, spec in uploads.items()}:
            raise ValueError(
                f"server: Sum answers with the sums of what clients send ({', '.join(sorted(uploads)[:3])}), which is "
                "not what model takes back; take FedAvg or the server of the method"
            )
        self.dtypes = {f"{name}_sum": spec.dtype for name, spec in uploads.items()}

    def aggregate(self, uploads: Mapping[int, Upload], context: Context) -> tuple[Answers, Metrics]:
        """One sum for all who sent something."""
        sums: dict[str, Tensor] = {}
        for upload in uploads.values():
            for name, tensor in upload.tensors.items():
                sums[f"{name}_sum"] = sums.get(f"{name}_sum", 0) + tensor.double()
        answer = {name: tensor.to(self.dtypes[name]) for name, tensor in sums.items()}
        return dict.fromkeys(uploads, Answer(answer)), {}


def average(models: Iterable[tuple[Mapping[str, Tensor], int]]) -> dict[str, Tensor]:
    """Tensor by tensor the weighted mean, summed up in float64; of integer tensors (counters) the maximum.

    Args:
        models: named tensors, the same names and shapes in each, with their weight. No weight is negative and not all
            are zero; they are divided by their sum. Gone through once.

    Raises:
        ValueError: if the weights make no mean.
    """
    weights: list[int] = []
    sums: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for model, weight in models:
        weights.append(weight)
        for name, tensor in model.items():
            if name not in sums:
                dtypes[name] = tensor.dtype
                sums[name] = tensor.double() * weight if tensor.is_floating_point() else tensor.clone()
            elif tensor.is_floating_point():
                sums[name].add_(tensor, alpha=weight)
            else:
                torch.maximum(sums[name], tensor, out=sums[name])
    total = sum(weights)
    if total <= 0 or min(weights) < 0:
        raise ValueError(f"weights {weights} must not be negative and must have a positive sum")
    return {n: (s / total).to(dtypes[n]) if dtypes[n].is_floating_point else s for n, s in sums.items()}
