"""The server: uploads of a round in, an answer to every client out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple, TypeVar

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from fedlscl.messages import MessageError, Schema, Upload
from fedlscl.robust import Averaging, Robust, Sizes, outliers
from fedlscl.schedule import Round

T = TypeVar("T")


class Answer(NamedTuple):
    """What one client gets, and metrics of how it was made, of which the mean over the clients goes on record."""

    tensors: Mapping[str, Tensor]
    metrics: Mapping[str, float] = {}


Answers = Mapping[int, Answer]
"""By client; each is asked for once."""


class Total(NamedTuple):
    """What the server knows of a round whose sums are secure, in the place of uploads.

    `tensors` are the sums, in float64, of what `Server.terms` gave for each of `clients`; `samples` is that of their
    training images.
    """

    clients: tuple[int, ...]
    samples: int
    tensors: Mapping[str, Tensor]


Metrics = Mapping[str, float]
"""Of one aggregation, by name, for the record."""


@dataclass(frozen=True)
class Context:
    """What a server knows of the round besides the uploads.

    Args:
        clients: number of clients in the federation, absent ones included.
        round: where the federation is.
        trainer: makes a fresh Trainer for each model that the server fits.
        start: the tensors with which all clients start, by the names under which they travel.
    """

    clients: int
    round: Round
    trainer: Callable[[], Trainer]
    start: Mapping[str, Tensor] = field(default_factory=dict)


class OnDemand(Mapping[int, T]):
    """What there is for each client, such as an answer, made when it is asked for: there is one in memory at a time.

    Args:
        clients: for whom there is something.
        make: makes it for a client.
    """

    def __init__(self, clients: Iterable[int], make: Callable[[int], T]) -> None:
        self._clients, self._make = dict.fromkeys(clients), make

    def __getitem__(self, client: int) -> T:
        """What there is for a client."""
        if client not in self._clients:
            raise KeyError(client)
        return self._make(client)

    def __contains__(self, client: object) -> bool:
        """Whether there is something for a client; makes nothing."""
        return client in self._clients

    def __iter__(self) -> Iterator[int]:
        """All clients for whom there is something."""
        return iter(self._clients)

    def __len__(self) -> int:
        """How many they are."""
        return len(self._clients)


class Server(ABC):
    """What every method's server does once a round.

    Uploads are looked at twice: each alone as it arrives, against its schema with the rules in it and by `check`, and
    all of a round beside each other before they are aggregated, by `compare`. Who does not pass is left out by name.
    """

    listens: ClassVar[bool] = True  # false: nobody uploads anything
    serves: ClassVar[str] = ""  # the client that it is made for, where it cannot serve all
    needs: ClassVar[tuple[str, ...]] = ()  # what such clients send, up to the first dot in the tensors' names
    gives: ClassVar[tuple[str, ...]] = ()  # likewise what they take back
    # how many times as large as is usual in its round a tensor may be, see docs/strangers.md for what honest ones are
    apart: ClassVar[float] = 100.0

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

    def compare(self, found: Mapping[int, Sizes], before: Sizes) -> dict[int, str]:
        """Look at the uploads of a round beside each other, by default for tensors that are far too large.

        Args:
            found: how large what each client sent is, see `fedlscl.robust.sizes`.
            before: what was usual before, see `fedlscl.robust.outliers`.

        Returns:
            By client why it is left out of the round.
        """
        return outliers(found, before, self.apart)

    def state(self) -> dict[str, Tensor]:
        """Everything of this server that must survive a round, as named tensors on the CPU; nothing by default."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027 - most servers have nothing to remember
        """Take over what `state` returned, also that of an earlier round; called before every round but the first."""

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

    # ---- secure sums

    def beyond_sums(self) -> str | None:
        """What this server does that takes more than sums over the clients, in words that follow its name, or None.

        Asked after `begin`. Whoever overrides `aggregate` has to override `from_sums` too, or has none.
        """
        kind = next(kind for kind in type(self).__mro__ if "aggregate" in vars(kind))
        return None if "from_sums" in vars(kind) else "looks at what each client sent"

    def terms(self, upload: Upload) -> Mapping[str, Tensor]:
        """What of an upload is added up over the clients, all of it by default.

        The client computes this where sums are secure. Names and shapes are the same whatever the upload holds.
        """
        return upload.tensors

    def factors(self, images: int) -> Mapping[str, int]:
        """Which terms are numbers that clients go on training from, and by how much each was multiplied at most.

        Fixed point holds these as finely as there is room, since training makes any other last bit larger; all other
        terms have 30 bits behind the point.

        Args:
            images: how many are behind an upload at most.
        """
        return {}

    def from_sums(self, total: Total, context: Context) -> tuple[Answers, Metrics]:
        """What `aggregate` does, from sums alone.

        Raises:
            MessageError: if these can be no sums of what clients should send.
        """
        raise NotImplementedError(f"{type(self).__name__} {self.beyond_sums()}")


class Isolated(Server):
    """No exchange: every client keeps its own model (Table 2 without O2D; local training)."""

    listens = False

    def aggregate(self, uploads: Mapping[int, Upload], context: Context) -> tuple[Answers, Metrics]:
        """Never called."""
        raise NotImplementedError("clients without exchange send nothing to aggregate")

    def beyond_sums(self) -> str:
        """There is nothing to add up."""
        return "lets nobody send anything"


WEIGHT = "sum of weights"
"""Under which name a mean's weights are added up."""


class FedAvg(Server):
    """The mean of the clients' tensors, the same for everyone, absent clients included (McMahan et al., 2017).

    Args:
        weighting: by the number of training `samples`, or `uniform`.
        robust: `none` for this mean, or an average that one client cannot take over: `clip`, `median` or
            `trimmed_mean`, see `fedlscl.robust.Averaging`.
        trim: the fraction that a trimmed mean leaves out at either end.
    """

    def __init__(
        self, weighting: Literal["samples", "uniform"] = "samples", robust: Robust = "none", trim: float = 0.2
    ) -> None:
        super().__init__()
        self.weighting, self.mean = weighting, Averaging(robust, trim)

    def begin(self, uploads: Schema, downloads: Schema, model: Callable[[], nn.Module]) -> None:
        """Average what clients take back; of what else they send FedAvg makes no use."""
        super().begin(uploads, downloads, model)
        if not downloads:
            raise ValueError("server: FedAvg has nothing to average, since model shares no tensor; take Isolated")
        self.names = tuple(name for name, spec in downloads.items() if not spec.optional)
        if unknown := sorted(set(self.names) - set(uploads)):
            raise ValueError(f"server: FedAvg averages what clients send, but model wants '{unknown[0]}' back")
        self.dtypes = {name: uploads[name].dtype for name in self.names}

    def state(self) -> dict[str, Tensor]:
        """What a robust average remembers."""
        return self.mean.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take it over."""
        self.mean.load(state)

    def aggregate(self, uploads: Mapping[int, Upload], context: Context) -> tuple[Answers, Metrics]:
        """One mean for all clients."""
        models = (
            (
                {name: upload.tensors[name] for name in self.names},
                upload.samples if self.weighting == "samples" else 1,
            )
            for upload in uploads.values()
        )
        mean = self.mean(models, context.start)
        return dict.fromkeys(range(context.clients), Answer(mean)), {}

    def beyond_sums(self) -> str | None:
        """A robust average compares uploads."""
        robust = None if self.mean.robust == "none" else f"has server.robust {self.mean.robust}, which compares uploads"
        return robust or super().beyond_sums()

    def terms(self, upload: Upload) -> Mapping[str, Tensor]:
        """Each tensor times the client's weight, and the weight."""
        weight = torch.tensor(upload.samples if self.weighting == "samples" else 1, dtype=torch.float64)
        return {WEIGHT: weight, **{name: upload.tensors[name].double() * weight for name in self.names}}

    def factors(self, images: int) -> Mapping[str, int]:
        """All that is averaged, but for counters."""
        weight = images if self.weighting == "samples" else 1
        return {name: weight for name in self.names if self.dtypes[name].is_floating_point}

    def from_sums(self, total: Total, context: Context) -> tuple[Answers, Metrics]:
        """One mean for all clients; of counters, whose largest no sum tells, it is rounded."""
        weight = total.tensors[WEIGHT]
        if not weight > 0:
            raise MessageError(f"the clients' weights add up to {float(weight):g}, must be more than 0")
        means = {name: total.tensors[name] / weight for name in self.names}
        dtypes = self.dtypes
        mean = {n: (m if dtypes[n].is_floating_point else m.round()).to(dtypes[n]) for n, m in means.items()}
        return dict.fromkeys(range(context.clients), Answer(mean)), {}


class Sum(Server):
    """The sum of the clients' tensors, for those with a part in it: all that secure aggregation would let it see.

    What clients send as `x` they get back as `x_sum`, in the same shape and dtype.
    """

    def begin(self, uploads: Schema, downloads: Schema, model: Callable[[], nn.Module]) -> None:
        """Only for clients that expect sums."""
        if downloads != {f"{name}_sum": replace(spec, rule=None) for name, spec in uploads.items()}:
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
        return self._answers(sums, uploads)

    def factors(self, images: int) -> Mapping[str, int]:
        """All of it, as it is."""
        return {name.removesuffix("_sum"): 1 for name in self.dtypes}

    def from_sums(self, total: Total, context: Context) -> tuple[Answers, Metrics]:
        """The sum, for all who have a part in it."""
        return self._answers({f"{name}_sum": tensor for name, tensor in total.tensors.items()}, total.clients)

    def _answers(self, sums: Mapping[str, Tensor], clients: Iterable[int]) -> tuple[Answers, Metrics]:
        answer = {name: tensor.to(self.dtypes[name]) for name, tensor in sums.items()}
        return dict.fromkeys(clients, Answer(answer)), {}
