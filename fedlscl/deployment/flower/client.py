"""A client's side of a federation on Flower: the app that answers for one client, whose state is on its own disk.

Flower makes it anew whenever it likes, from the words of the command line.
"""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any, NamedTuple

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from lightning.pytorch.loggers import Logger

from fedlscl.deployment.flower.wire import (
    ENDS,
    MASKING,
    UPLOAD,
    array_of,
    names_sha256,
    payload,
)
from fedlscl.deployment.flower.words import as_error, experiment_of
from fedlscl.deployment.node import End, Known, Node
from fedlscl.deployment.shares import LocalShare
from fedlscl.federation.worker import Worker
from fedlscl.files import locked, make_folder
from fedlscl.models.stored import weights_sha256
from fedlscl.run.configuration import Configuration
from fedlscl.schedule import Round

log = logging.getLogger(__name__)
client_app = ClientApp()

Handler = Callable[[Message, Context], Message]
CLIENT_FAILED = 2  # of Flower's error codes, which its public modules do not name


class NotThisClient(ValueError):
    """A message, or data, of another client."""


class OtherWeights(ValueError):
    """A frozen model that this node does not take: its server could have made one that writes images into features."""


def tells_types_alone(handler: Handler) -> Handler:
    """Reply with the type of an exception; its text, which may name files, stays in the log of this machine."""

    @wraps(handler)
    def guarded(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except Exception as error:
            log.error("%s: %s", type(error).__name__, error, exc_info=error)
            return Message(Error(CLIENT_FAILED, type(error).__name__), reply_to=message)

    return guarded


@client_app.query("who")
@tells_types_alone
def who(message: Message, context: Context) -> Message:
    """Say which client this is, of which classes and split its data are, and what the run's words mean here.

    Its own words may name the weights by another path.
    """
    index, folder = _client(context), str(context.node_config.get("data", ""))
    data = LocalShare(Path(folder)) if folder else _own(context)[1].worker.template.data
    data.setup()
    words, own_words = str(context.run_config["words"]), str(context.node_config.get("words", ""))
    weights = _weights(words, own_words, str(context.node_config.get("weights", "")))
    with as_error():
        values = Configuration(shlex.split(f"{words} {own_words}")).values
        own = {
            "split": data.split_sha256,
            "list of classes": names_sha256(data),
            "configuration": Configuration(shlex.split(words)).sha256,
            "file of weights": weights or "none",
            "file of the CNN's weights": weights_sha256("cnn", values["cnn"]["weights"]) or "none",
        }
    return _reply(message, who=ConfigRecord({"client": index, **own}))


@client_app.train()
@tells_types_alone
def fit(message: Message, context: Context) -> Message:
    """Train in a round, and reply with the upload and what training logged."""
    numbers, metrics = message.content.config_records["round"], _Metrics()
    with _node(message, context) as node:
        round = Round(
            _integer(numbers, "task"), _integer(numbers, "round"), bool(numbers["ends_task"]), node.worker.template.seed
        )
        masking = payload(message.content, MASKING) if MASKING in message.content.array_records else None
        upload = node.fit(round, _known(message.content), bool(numbers["uploads"]), metrics, masking)
    sent = metrics.values if _own(context)[1].sends else {}
    records: dict[str, Any] = {"metrics": MetricRecord({**sent})}
    if upload is not None:
        records["upload"] = ArrayRecord({UPLOAD: array_of(upload)})
    return _reply(message, **records)


@client_app.query("secure")
@tells_types_alone
def secure(message: Message, context: Context) -> Message:
    """Take a step of a secure sum."""
    numbers = message.content.config_records["round"]
    with _node(message, context) as node:
        round = Round(_integer(numbers, "task"), _integer(numbers, "round"), False, node.worker.template.seed)
        reply = node.secure(str(numbers["step"]), round, payload(message.content, MASKING))
    return _reply(message, upload=ArrayRecord({UPLOAD: array_of(reply)}))


@client_app.evaluate()
@tells_types_alone
def end(message: Message, context: Context) -> Message:
    """Hear the end of a round, and reply with the accuracies."""
    with _node(message, context) as node:
        accuracy = node.end(_known(message.content))
    return _reply(message, accuracy=MetricRecord({**accuracy}))


@client_app.query("cost")
@tells_types_alone
def cost(message: Message, context: Context) -> Message:
    """Count what this client trains and computes."""
    with _node(message, context) as node:
        counts = node.cost(_known(message.content))
    return _reply(message, cost=MetricRecord({**counts}))


@contextmanager
def _node(message: Message, context: Context) -> Iterator[Node]:
    """This client and its disk; waits for a simulation's worker that still answers a message that has timed out."""
    index, place = _own(context)
    meant = _integer(message.content.config_records["round"], "client")
    if meant != index:
        raise NotThisClient(f"the message is for client {meant}, and this is client {index}")
    make_folder(place.folder)
    with locked(place.folder / f".client-{index}.lock", wait=True):
        yield Node(place.worker, index, place.folder / f"client-{index}")


class _Place(NamedTuple):
    worker: Worker  # what clients train with
    folder: Path  # where their states are
    sends: bool  # whether the metrics of training leave this machine


def _own(context: Context) -> tuple[int, _Place]:
    """Which client this is, and the place where it trains.

    In the node's configuration: ``client``, its number; ``data``, its share as `fedlscl deal` writes it; ``words``,
    what is different on this machine, such as ``--trainer.accelerator gpu``; ``weights``, the SHA-256 of the only file
    of weights of the frozen model that is taken. In a simulation all is that of the run.
    """
    config, index = context.node_config, _client(context)
    own = (str(config.get(name, "")) for name in ("words", "data", "weights"))
    place = _place(str(context.run_config["words"]), *own)
    template = place.worker.template
    if not 0 <= index < template.clients or not template.data.split.clients[index].tasks:
        raise NotThisClient(f"client is {index} in the node's configuration, but the data there are not of that client")
    return index, place


def _client(context: Context) -> int:
    index = context.node_config.get("client", context.node_config.get("partition-id"))
    if type(index) is not int:
        raise ValueError(f"client is {index!r} in the node's configuration, must be a number: client=0")
    return index


@cache
def _place(words: str, own_words: str, data: str, weights: str) -> _Place:
    """As the words say; a process that answers several messages builds it once."""
    found = _weights(words, own_words, weights)
    if data and not weights and "backbone.weights" not in own_words:
        log.warning(
            "this node computes its features with whatever frozen model the run's words name (file of weights: %s); "
            "weights=... in the node's configuration fixes which one", found or "none"
        )  # fmt: skip
    with as_error():
        folder = Configuration(shlex.split(words)).run_dir
    experiment = experiment_of(f"{words} {own_words}", data)
    template = experiment.template()
    if experiment.schedule.secure:
        template.begin()  # which of its tensors are added up is the server's to say
    return _Place(Worker(template), folder, experiment.tracking.sends(experiment.schedule.secure))


def _weights(words: str, own_words: str, fixed: str) -> str | None:
    """The SHA-256 of the file of weights of the frozen model that the words lead to, None if they name none.

    Raises:
        OtherWeights: if it is not the one that this node takes.
    """
    with as_error():
        named = Configuration(shlex.split(f"{words} {own_words}")).values["backbone"]["weights"]
        found = weights_sha256("backbone", named)
    if fixed and not re.fullmatch("[0-9a-f]{64}", fixed):
        raise ValueError(
            f"weights is {fixed[:80]!r} in the node's configuration, must be a SHA-256: 64 signs of 0-9a-f"
        )
    if fixed and found != fixed:
        raise OtherWeights(
            f"the words lead to backbone.weights {named!r} with the SHA-256 {found or 'of no file'}, and weights in "
            f"the node's configuration is {fixed}: with others the server could read images in sums of features; "
            "nothing was computed. Take the run's file if you trust it, and put its SHA-256 there"
        )
    return found


class _Metrics(Logger):
    """Keeps what a fit logs."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, float] = {}

    @property
    def name(self) -> str:
        return "client"

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.values |= {name: float(value) for name, value in metrics.items()}

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def _known(content: RecordDict) -> Known:
    """What the server knows of this client, as its message says it."""
    messages = {name: array.data for name, array in content.array_records["downloads"].items()}
    tasks, rounds, accepted = (_integers(content.config_records["ends"], name) for name in ENDS)
    return Known(
        since=_integer(content.config_records["round"], "since"),
        start=messages.get("0"),
        ends=tuple(
            End(task, round, bool(counts), messages.get(str(round)))
            for task, round, counts in zip(tasks, rounds, accepted, strict=True)
        ),
    )


def _integer(record: ConfigRecord, name: str) -> int:
    value = record.get(name)
    if type(value) is not int:
        raise ValueError(f"the message's {name} is {str(value)[:40]}, must be a whole number")
    return value


def _integers(record: ConfigRecord, name: str) -> list[int]:
    values = record.get(name, [])
    if not isinstance(values, list):
        raise ValueError(f"the message's {name} is {str(values)[:40]}, must be a list")
    return [int(value) for value in values]


def _reply(message: Message, **records: Any) -> Message:
    return Message(RecordDict(records), reply_to=message)
