"""The same federation on Flower: the clients on other machines, or several at once on this one.

The only module that knows Flower. `server_app` runs an experiment whose messages Flower carries; `client_app` answers
for one client, whose state is on the disk of its own machine. Flower makes both anew whenever it likes, from the words
of the command line, which travel as ``words`` in the run's configuration.

What crosses the wire: the serialised `Upload` and `Download` as they are in one process, and numbers.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import math
import re
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from lightning.pytorch.loggers import Logger
from rich.console import Console

from fedlscl.data.module import FederatedDataModule
from fedlscl.deployment.node import End, Known, Node
from fedlscl.deployment.shares import LocalShare
from fedlscl.evaluation import MASKS
from fedlscl.federation.algorithm import MOST_SAID
from fedlscl.federation.callback import FederationCallback
from fedlscl.federation.store import Store
from fedlscl.federation.template import Template
from fedlscl.federation.transport import LEDGER, Fitted
from fedlscl.federation.worker import COUNTS, Accuracy, Worker
from fedlscl.messages import Download
from fedlscl.models.vit import weights_sha256
from fedlscl.run.configuration import Configuration
from fedlscl.run.experiment import Experiment
from fedlscl.schedule import Round

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1  # at first, and after each reply; more and more up to
SLOWEST_POLL_SECONDS = 2.0
FIT, END, WHO, COST = "train", "evaluate", "query.who", "query.cost"

server_app = ServerApp()
client_app = ClientApp()


# ---- the server's side


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """Run or continue the experiment that the run's configuration describes.

    Its fields: ``words``, those behind `fedlscl fit`; ``data``, the server's share as `fedlscl deal` writes it, empty
    to take the configuration's own data; ``timeout``, how many seconds clients have for a fit, and again to hear its
    end.
    """
    config = context.run_config
    timeout = config["timeout"]
    if isinstance(timeout, str) or not timeout > 0:
        raise ValueError(f"timeout is {timeout!r}, must be a positive number of seconds")
    experiment = _experiment(str(config["words"]), str(config["data"]))
    configuration = Configuration(shlex.split(str(config["words"])))
    transport = partial(FlowerTransport, grid=grid, configuration=configuration.sha256, timeout=timeout)
    experiment = replace(experiment, transport=transport)
    experiment.run(Console())


class FlowerTransport:
    """Clients at the other end of Flower's grid.

    A client has until the time-out to appear and to reply; then the round goes on without it, and it is told what it
    has missed when it is asked next. What was confirmed by whom is kept in the federation's store, so that a
    server that continues a run sends every client back to the same round.

    Args:
        template: what the clients' models look like.
        store: the federation's.
        grid: Flower's way to the nodes.
        configuration: hash of the run's configuration, which every node must have as well.
        timeout: seconds that clients have, for a fit and again to hear its end.

    Raises:
        ValueError: if the store is that of a run in one process.
    """

    def __init__(self, template: Template, store: Store, *, grid: Grid, configuration: str, timeout: float) -> None:
        self.template, self.store, self.grid, self.timeout = template, store, grid, timeout
        self.configuration = configuration
        if store.progress and LEDGER not in store.files:
            raise ValueError(
                f"{store.folder} holds a run in one process; go on with `fedlscl fit`, or give another run_dir"
            )
        self._clients: dict[int, int] = {}  # by node
        self._homes: dict[int, int] = {}  # by client the node that it was met at last
        self._asked: dict[str, tuple[int, float]] = {}  # by the message that asks whose it is a node, and until when
        self._refused: set[int] = set()  # nodes
        self._absent: set[int] = set()  # clients without a node at the end of the last exchange
        ledger = store.read(LEDGER) or {
            "since": torch.zeros(template.clients, dtype=torch.int64),
            "missed": torch.zeros((0, len(_COLUMNS)), dtype=torch.int64),
        }
        self._since: list[int] = ledger["since"].tolist()
        self._missed: list[list[int]] = ledger["missed"].tolist()

    def fit(
        self, round: Round, clients: Sequence[int], uploads: bool, callback: FederationCallback
    ) -> Iterator[Fitted]:
        """Let them train, all at the same time."""
        for client, reply in self._exchange(FIT, round, clients, {"uploads": uploads, "ends_task": round.ends_task}):
            logger = callback.on_fit_start(round.task, round.number, client)
            yield self._fitted(client, reply, uploads, logger)
            callback.on_fit_end()

    def _fitted(self, client: int, reply: RecordDict | str, uploads: bool, logger: Logger | None) -> Fitted:
        if isinstance(reply, str):
            return Fitted(client, None, reply)
        try:
            metrics = _numbers(reply, "metrics")
            message = _payload(reply, UPLOAD) if uploads else None
        except ValueError as error:
            return Fitted(client, None, f"{type(error).__name__}: {error}")
        if logger is not None:
            logger.log_metrics(metrics)
        return Fitted(client, message, None)

    def answer(self, round: Round, client: int, message: bytes | None, accepted: bool) -> None:
        """Put it on record: until the client confirms it, it has missed this end."""
        if message is not None:
            # the values are checked where they are read; here they only have to be the same bytes again
            tensors = Download.from_bytes(message, self.template.model_of(client).download_schema()).tensors
            self.store.write(_missed(client, round.number), tensors)
        self._missed.append([client, round.task, round.number, int(accepted), int(message is not None)])

    def evaluate(self, round: Round, client: int) -> None:
        """The client does it when it hears the end."""

    def evaluations(self, round: Round) -> Mapping[int, Accuracy]:
        """Tell all clients what they have not heard yet."""
        found: dict[int, Accuracy] = {}
        for client, reply in self._exchange(END, round, range(self.template.clients), {}):
            if not isinstance(reply, str):
                try:
                    found[client] = _accuracy(reply, round.task)
                except ValueError as error:
                    reply = f"{type(error).__name__}: {error}"
            if isinstance(reply, str):
                log.warning("client %d has not ended round %d: %s", client, round.number, reply)
                continue
            self._since[client] = round.number
            for entry in [entry for entry in self._missed if entry[0] == client]:
                self.store.forget(_missed(client, entry[2]))
                self._missed.remove(entry)
        missed = torch.tensor(self._missed, dtype=torch.int64).reshape(-1, len(_COLUMNS))
        self.store.write(LEDGER, {"since": torch.tensor(self._since), "missed": missed})
        return found

    def cost(self, client: int) -> dict[str, int]:
        """Ask the client."""
        for _, reply in self._exchange(COST, Round(0, 0, True, 0), [client], {}):
            problem = reply
            if not isinstance(reply, str):
                try:
                    counts = {name: int(value) for name, value in _numbers(reply, "cost").items()}
                    if set(counts) == set(COUNTS) and min(counts.values()) >= 0:
                        return counts
                    problem = f"it counts {sorted(counts)}"
                except ValueError as error:
                    problem = str(error)
            log.warning("client %d does not say what it computes: %s", client, problem)
        return {}

    def _exchange(
        self, kind: str, round: Round, clients: Sequence[int], more: Mapping[str, bool]
    ) -> Iterator[tuple[int, RecordDict | str]]:
        """Send each client its message as soon as it is there; yield its reply, or why there is none."""
        waiting, sent, deadline = list(clients), dict[str, int](), time.monotonic() + self.timeout
        self._asked = {message_id: asked for message_id, asked in self._asked.items() if asked[1] > time.monotonic()}
        self._refused.clear()  # what was wrong with a node may have been put right
        answered = kind == COST  # the run is over, and whoever is there will do
        pause = POLL_SECONDS
        while waiting or sent:
            late = time.monotonic() >= deadline  # a reply that took long to fetch must not cost others theirs
            nodes = self._nodes()
            for client in [client for client in waiting if client in nodes]:
                if message_id := self._push(self._content(client, round, more), nodes[client], kind):
                    waiting.remove(client)
                    sent[message_id] = client
            for message_id, reply in self._pull(sent):
                client = sent.pop(message_id)
                if _is_away(reply):
                    waiting.append(client)  # until the time-out it may come back
                    continue
                answered, pause = True, POLL_SECONDS
                yield client, _problem(reply) if isinstance(reply, Error) else reply
            if late or (answered and not sent and self._absent.issuperset(waiting)):
                break  # who was not there before either holds nobody up
            if waiting or sent:
                time.sleep(pause)
                pause = min(1.5 * pause, SLOWEST_POLL_SECONDS)
        self._absent = self._absent.difference(clients).union(waiting)
        for client in waiting:
            within = f"within {self.timeout:g} s" if late else "since an earlier message"
            yield client, f"TimeoutError: no node of this client {within}"
        for client in sent.values():
            yield client, f"TimeoutError: no reply within {self.timeout:g} s"

    def _push(self, content: RecordDict, node: int, kind: str) -> str | None:
        """Send a message; its id, or None if Flower does not take it now."""
        return next(iter(self.grid.push_messages([Message(content, node, kind, ttl=self.timeout)])), None) or None

    def _pull(self, message_ids: Iterable[str]) -> Iterator[tuple[str, RecordDict | Error]]:
        """The replies that are there, each under the message that it was asked for with.

        One by one: what a node has sent is unpacked here, and must harm nobody else if that fails. Flower also hands
        over what nodes send unasked; only who got a message knows its id.
        """
        for message_id in list(message_ids):
            try:
                replies = list(self.grid.pull_messages([message_id]))
            except Exception as error:
                log.warning("a reply cannot be read", exc_info=error)
                yield message_id, Error(0, f"{type(error).__name__}: {error}")
                continue
            for reply in [reply for reply in replies if reply.metadata.reply_to_message_id == message_id][:1]:
                yield message_id, reply.error if reply.has_error() else reply.content

    def _content(self, client: int, round: Round, more: Mapping[str, bool]) -> RecordDict:
        entries = sorted(entry for entry in self._missed if entry[0] == client)
        since, messages = self._since[client], dict[str, bytes]()
        if since == 0 and not any(accepted for _, _, _, accepted, _ in entries[:1]):
            messages["0"] = self.template.start_message(client)
        for _, task, number, _, there in entries:
            if there:
                tensors = self.store.read(_missed(client, number))
                assert tensors is not None  # `answer` has put them there
                messages[str(number)] = Download(client, task, number, 0, tensors).to_bytes()
        numbers = {"client": client, "task": round.task, "round": round.number, "since": since}
        ends = {name: [entry[_COLUMNS.index(name)] for entry in entries] for name in ENDS}
        return RecordDict(
            {
                "round": ConfigRecord({**numbers, **more}),
                "ends": ConfigRecord({**ends}),
                "downloads": ArrayRecord({name: _array(message) for name, message in messages.items()}),
            }
        )

    def _nodes(self) -> dict[int, int]:
        """The node of each client that is there; a node that is new is asked whose it is."""
        online = set(self.grid.get_node_ids())
        self._refused &= online
        # who comes back may have other data
        self._clients = {node: client for node, client in self._clients.items() if node in online}
        self._asked = {message_id: asked for message_id, asked in self._asked.items() if asked[0] in online}
        for node in sorted(online - set(self._clients) - self._refused - {node for node, _ in self._asked.values()}):
            if message_id := self._push(RecordDict(), node, WHO):
                self._asked[message_id] = node, time.monotonic() + self.timeout
        for message_id, reply in self._pull(self._asked):
            node, _ = self._asked.pop(message_id)
            if _is_away(reply):
                continue
            problem = _problem(reply) if isinstance(reply, Error) else self._meet(node, reply)
            if problem:
                self._refused.add(node)
                log.warning("node %d is refused: %s", node, problem)
        return {client: node for node, client in self._clients.items()}

    def _meet(self, node: int, content: RecordDict) -> str | None:
        who = content.config_records.get("who", ConfigRecord())
        client = who.get("client")
        if type(client) is not int or not 0 <= client < self.template.clients:
            said = client if type(client) is int else str(client)[:40]
            return f"it says that it is client {said!r}, of which there are {self.template.clients}, numbered from 0"
        data = self.template.data
        for name, own in (
            ("split", data.split_sha256),
            ("list of classes", _names_sha256(data)),
            ("configuration", self.configuration),
            ("file of weights", self.template.vit.weights_sha256 or "none"),
        ):
            if who.get(name) != own:
                return f"client {client} has another {name} ({str(who.get(name))[:12]}) than this run ({own[:12]})"
        if others := [other for other, its in self._clients.items() if its == client]:
            return f"it says that it is client {client}, which is at node {others[0]}"
        self._clients[node] = client
        if self._homes.setdefault(client, node) != node:
            log.warning("client %d was at node %d and is at node %d now", client, self._homes[client], node)
            self._homes[client] = node
        return None


# ---- the client's side


@client_app.query("who")
def who(message: Message, context: Context) -> Message:
    """Say which client this is, of which classes and split its data are, and what the run's words mean here.

    Its own words may name the weights by another path.
    """
    index, folder = _client(context), str(context.node_config.get("data", ""))
    data = LocalShare(Path(folder)) if folder else _own(context)[1].template.data
    data.setup()
    words, own_words = str(context.run_config["words"]), str(context.node_config.get("words", ""))
    with _as_error():
        weights = Configuration(shlex.split(f"{words} {own_words}")).values["backbone"]["weights"]
        own = {
            "split": data.split_sha256,
            "list of classes": _names_sha256(data),
            "configuration": Configuration(shlex.split(words)).sha256,
            "file of weights": weights_sha256(weights) or "none",
        }
    return _reply(message, who=ConfigRecord({"client": index, **own}))


@client_app.train()
def fit(message: Message, context: Context) -> Message:
    """Train in a round, and reply with the upload and what training logged."""
    numbers, metrics = message.content.config_records["round"], _Metrics()
    with _node(message, context) as node:
        round = Round(
            _integer(numbers, "task"), _integer(numbers, "round"), bool(numbers["ends_task"]), node.worker.template.seed
        )
        upload = node.fit(round, _known(message.content), bool(numbers["uploads"]), metrics)
    records: dict[str, Any] = {"metrics": MetricRecord({**metrics.values})}
    if upload is not None:
        records["upload"] = ArrayRecord({UPLOAD: _array(upload)})
    return _reply(message, **records)


@client_app.evaluate()
def end(message: Message, context: Context) -> Message:
    """Hear the end of a round, and reply with the accuracies."""
    with _node(message, context) as node:
        accuracy = node.end(_known(message.content))
    return _reply(message, accuracy=MetricRecord({**accuracy}))


@client_app.query("cost")
def cost(message: Message, context: Context) -> Message:
    """Count what this client trains and computes."""
    with _node(message, context) as node:
        counts = node.cost(_known(message.content))
    return _reply(message, cost=MetricRecord({**counts}))


@contextmanager
def _node(message: Message, context: Context) -> Iterator[Node]:
    """This client and its disk; waits for a simulation's worker that still answers a message that has timed out."""
    index, worker, folder = _own(context)
    meant = _integer(message.content.config_records["round"], "client")
    if meant != index:
        raise ValueError(f"the message is for client {meant}, and this is client {index}")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".client-{index}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield Node(worker, index, folder / f"client-{index}")


def _own(context: Context) -> tuple[int, Worker, Path]:
    """Which client this is, what it trains with, and where its state is.

    In the node's configuration: ``client``, its number; ``data``, its share as `fedlscl deal` writes it; ``words``,
    what is different on this machine, such as ``--trainer.accelerator gpu``. In a simulation all is that of the run.
    """
    config, index = context.node_config, _client(context)
    worker, folder = _worker(
        str(context.run_config["words"]), str(config.get("words", "")), str(config.get("data", ""))
    )
    if not 0 <= index < worker.template.clients or not worker.template.data.split.clients[index].tasks:
        raise ValueError(f"client is {index} in the node's configuration, but the data there are not of that client")
    return index, worker, folder


def _client(context: Context) -> int:
    index = context.node_config.get("client", context.node_config.get("partition-id"))
    if type(index) is not int:
        raise ValueError(f"client is {index!r} in the node's configuration, must be a number: client=0")
    return index


@cache
def _worker(words: str, own_words: str, data: str) -> tuple[Worker, Path]:
    """What clients train with, and their folder; a process that answers several messages builds it once."""
    with _as_error():
        folder = Configuration(shlex.split(words)).run_dir
    return Worker(_experiment(f"{words} {own_words}", data).template()), folder


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


# ---- both


def _experiment(words: str, data: str) -> Experiment:
    """The experiment of a command line, with the data of `data`, a share, if that is not empty.

    Raises:
        ValueError: if the words describe none; what is wrong with them is on the standard error.
    """
    with _as_error():
        experiment = Configuration(shlex.split(words)).build()
    if data:
        whole, share = experiment.data, LocalShare(Path(data), experiment.data.device_mib)
        for name, of_share, configured in (
            ("seed", share.seed, whole.seed),
            ("split", share.split_spec, whole.split_spec),
        ):
            if of_share != configured:
                raise ValueError(f"{data} was dealt with data.{name} {of_share}, the run has {configured}; deal again")
        experiment = replace(experiment, data=share)
    experiment.load()
    return experiment


@contextmanager
def _as_error() -> Iterator[None]:
    """Words that cannot be parsed end a command; here they must not end Flower's process."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            yield
    except (ValueError, OSError) as error:  # of shlex, and of what cannot be built
        raise ValueError(f"words of the run or the node: {error}") from error
    except SystemExit as end:
        reason = " ".join(said.getvalue().split())[-500:] or end
        raise ValueError(f"words of the run or the node: {reason}") from end


UPLOAD = "upload"
ENDS = ("task", "round", "accepted")
_COLUMNS = ("client", *ENDS, "answered")
_STYPE = "safetensors"
NODE_UNAVAILABLE = 5  # of Flower's error codes, which its public modules do not name
METRIC, MOST_METRICS = re.compile(r"[\w/.-]{1,64}"), 64


def _names_sha256(data: FederatedDataModule) -> str:
    return hashlib.sha256(json.dumps(data.class_names).encode()).hexdigest()


def _missed(client: int, round: int) -> str:
    return f"missed-{client}-{round}"


def _array(message: bytes) -> Array:
    """A serialised message as Flower carries it."""
    return Array("uint8", (len(message),), _STYPE, message)


def _problem(error: Error) -> str:
    """What a node or Flower says went wrong; a node may say it at any length."""
    return (error.reason or f"Flower's error {error.code}")[:MOST_SAID]


def _is_away(reply: RecordDict | Error) -> bool:
    """Whether Flower has replied itself, because it has not heard of the node for a while."""
    return isinstance(reply, Error) and reply.code == NODE_UNAVAILABLE


def _payload(content: RecordDict, name: str) -> bytes:
    array = content.array_records.get(name, ArrayRecord()).get(name)
    if array is None or array.stype != _STYPE:
        raise ValueError(f"the reply holds no '{name}'")
    return array.data


def _numbers(content: RecordDict, name: str) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for key, value in content.metric_records.get(name, MetricRecord()).items():
        if isinstance(value, list) or not math.isfinite(value):
            raise ValueError(f"{name}: {key[:64]} is {str(value)[:40]}, must be a finite number")
        if not METRIC.fullmatch(key) or len(numbers) == MOST_METRICS:
            raise ValueError(f"{name}: {key[:64]!r} is no name of a metric, or one too many")
        numbers[key] = value
    return numbers


def _accuracy(content: RecordDict, tasks: int) -> Accuracy:
    """What a reply says about a client's accuracy.

    Raises:
        ValueError: if it is not one number from 0 to 100 for each mask and task, or NaN where there are no test images.
    """
    record = content.metric_records.get("accuracy", MetricRecord())
    accuracy = {}
    for mask in MASKS:
        values = record.get(mask)
        if not isinstance(values, list) or len(values) != tasks or any(v < 0 or v > 100 for v in values):
            raise ValueError(f"accuracy under mask {mask} is {str(values)[:40]}, must be {tasks} numbers in %")
        accuracy[mask] = [float(value) for value in values]
    return accuracy


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
