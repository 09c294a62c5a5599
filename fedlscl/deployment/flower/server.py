"""The server's side of a federation on Flower: the app, and how messages reach clients at nodes."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from lightning.pytorch.loggers import Logger
from rich.console import Console

from fedlscl.deployment.flower.nodes import Bindings, Patience, key_of
from fedlscl.deployment.flower.wire import (
    COST,
    END,
    ENDS,
    FIT,
    MASKING,
    SECURE,
    UPLOAD,
    WHO,
    array_of,
    metrics_of,
    names_sha256,
    payload,
)
from fedlscl.deployment.flower.words import experiment_of
from fedlscl.evaluation import MASKS
from fedlscl.federation.callback import FederationCallback
from fedlscl.federation.store import Store
from fedlscl.federation.template import Template
from fedlscl.federation.transport import LEDGER, Fitted, Replied
from fedlscl.federation.worker import COUNTS, Accuracy
from fedlscl.messages import Download, in_a_line
from fedlscl.run.configuration import Configuration
from fedlscl.schedule import Round

log = logging.getLogger(__name__)


POLL_SECONDS = 0.1  # at first, and after each reply; more and more up to
SLOWEST_POLL_SECONDS = 2.0
server_app = ServerApp()


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """Run or continue the experiment that the run's configuration describes.

    Its fields: ``words``, those behind `fedlscl fit`; ``data``, the server's share as `fedlscl deal` writes it, empty
    to take the configuration's own data; ``timeout``, how many seconds clients have for a fit, and again to hear its
    end; ``clients``, their keys, see `Bindings`; ``patience``, see `Patience`.
    """
    config = context.run_config
    timeout = config["timeout"]
    if isinstance(timeout, str) or not timeout > 0:
        raise ValueError(f"timeout is {timeout!r}, must be a positive number of seconds")
    experiment = experiment_of(str(config["words"]), str(config["data"]))
    configuration = Configuration(shlex.split(str(config["words"])))
    transport = partial(
        FlowerTransport,
        grid=grid,
        configuration=configuration.sha256,
        timeout=timeout,
        clients=str(config.get("clients", "")),
        patience=config.get("patience", 2),
    )
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
        clients: the keys of clients' nodes, see `Bindings`; those of the others are learned and kept in the store.
        patience: after how many rounds a client that does not reply is dropped, see `Patience`.

    Raises:
        ValueError: if the store is that of a run in one process, or `clients` or `patience` is wrong.
    """

    def __init__(
        self,
        template: Template,
        store: Store,
        *,
        grid: Grid,
        configuration: str,
        timeout: float,
        clients: str = "",
        patience: Any = 2,
    ) -> None:
        self.template, self.store, self.grid, self.timeout = template, store, grid, timeout
        self.configuration = configuration
        if store.progress.get("history") and LEDGER not in store.files:
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
        self._bindings = Bindings(template.clients, clients, ledger.get("keys"))
        self._patience, self._late, self._heard = Patience(patience), set[int](), set[int]()

    @property
    def nodes(self) -> dict[str, str]:
        """By client the key that its node has; none in a simulation."""
        return {str(client): key for client, key in sorted(self._bindings.keys.items())}

    def ask(self, step: str, round: Round, messages: Mapping[int, bytes]) -> Iterator[Replied]:
        """Ask them all at the same time."""

        def content(client: int) -> RecordDict:
            numbers = ConfigRecord({"client": client, "task": round.task, "round": round.number, "step": step})
            return RecordDict({"round": numbers, **_masking(messages[client])})

        for client, reply in self._exchange(SECURE, round, [*messages], content):
            problem, message = reply if isinstance(reply, str) else None, None
            if not isinstance(reply, str):
                try:
                    message = payload(reply, UPLOAD)
                except ValueError as error:
                    problem = f"{type(error).__name__}: {error}"
            yield client, message, problem

    def fit(
        self,
        round: Round,
        clients: Sequence[int],
        uploads: bool,
        callback: FederationCallback,
        masking: Mapping[int, bytes] | None = None,
    ) -> Iterator[Fitted]:
        """Let them train, all at the same time."""
        numbers = {"uploads": uploads, "ends_task": round.ends_task}

        def content(client: int) -> RecordDict:
            found = self._content(client, round, numbers)
            if masking is not None:
                found.update(_masking(masking[client]))
            return found

        for client, reply in self._exchange(FIT, round, clients, content):
            logger = callback.on_fit_start(round.task, round.number, client)
            yield self._fitted(client, reply, uploads, logger)
            callback.on_fit_end()

    def _fitted(self, client: int, reply: RecordDict | str, uploads: bool, logger: Logger | None) -> Fitted:
        if isinstance(reply, str):
            return Fitted(client, None, reply)
        try:
            metrics = metrics_of(reply, "metrics")
            message = payload(reply, UPLOAD) if uploads else None
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
        for client, reply in self._exchange(
            END, round, range(self.template.clients), partial(self._content, round=round)
        ):
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
        for node in self._patience.end(round.number, self._late, self._heard, self._by_client()):
            self._absent.add(self._clients.pop(node))
        self._late, self._heard = set(), set()
        missed = torch.tensor(self._missed, dtype=torch.int64).reshape(-1, len(_COLUMNS))
        ledger = {"since": torch.tensor(self._since), "missed": missed, "keys": self._bindings.learned()}
        self.store.write(LEDGER, ledger)
        return found

    def cost(self, client: int) -> dict[str, int]:
        """Ask the client."""
        over = Round(0, 0, True, 0)
        for _, reply in self._exchange(COST, over, [client], partial(self._content, round=over)):
            problem = reply
            if not isinstance(reply, str):
                try:
                    counts = {name: int(value) for name, value in metrics_of(reply, "cost").items()}
                    if set(counts) == set(COUNTS) and min(counts.values()) >= 0:
                        return counts
                    problem = f"it counts {sorted(counts)}"
                except ValueError as error:
                    problem = str(error)
            log.warning("client %d does not say what it computes: %s", client, problem)
        return {}

    def _exchange(
        self, kind: str, round: Round, clients: Sequence[int], content: Callable[[int], RecordDict]
    ) -> Iterator[tuple[int, RecordDict | str]]:
        """Send each client its message as soon as it is there; yield its reply, or why there is none."""
        self._patience.nodes({node.node_id for node in self.grid.get_nodes()}, round.number)
        dropped = self._patience.clients() if kind != COST else set()
        waiting = [client for client in clients if client not in dropped]
        sent, deadline = dict[str, int](), time.monotonic() + self.timeout
        self._asked = {message_id: asked for message_id, asked in self._asked.items() if asked[1] > time.monotonic()}
        self._refused.clear()  # what was wrong with a node may have been put right
        answered = kind == COST  # the run is over, and whoever is there will do
        pause = POLL_SECONDS
        while waiting or sent:
            late = time.monotonic() >= deadline  # a reply that took long to fetch must not cost others theirs
            nodes = self._nodes(round.number)
            for client in [client for client in waiting if client in nodes]:
                if message_id := self._push(content(client), nodes[client], kind):
                    waiting.remove(client)
                    sent[message_id] = client
            for message_id, reply in self._pull(sent):
                client = sent.pop(message_id)
                if _is_away(reply):
                    waiting.append(client)  # until the time-out it may come back
                    continue
                answered, pause = True, POLL_SECONDS
                self._heard.add(client)
                yield client, _problem(reply) if isinstance(reply, Error) else reply
            if late or (answered and not sent and self._absent.issuperset(waiting)):
                break  # who was not there before either holds nobody up
            if waiting or sent:
                time.sleep(pause)
                pause = min(1.5 * pause, SLOWEST_POLL_SECONDS)
        self._absent = self._absent.difference(clients).union(waiting, dropped)
        self._late.update(sent.values())
        for client in dropped.intersection(clients):
            yield client, f"TimeoutError: dropped, {self._patience.reason()}"
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
                problem = in_a_line(f"{type(error).__name__}: {error}")
                log.warning("a reply cannot be read: %s", problem)
                yield message_id, Error(0, problem)
                continue
            for reply in [reply for reply in replies if reply.metadata.reply_to_message_id == message_id][:1]:
                yield message_id, reply.error if reply.has_error() else reply.content

    def _content(self, client: int, round: Round, more: Mapping[str, bool] = MappingProxyType({})) -> RecordDict:
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
                "downloads": ArrayRecord({name: array_of(message) for name, message in messages.items()}),
            }
        )

    def _by_client(self) -> dict[int, int]:
        return {client: node for node, client in self._clients.items()}

    def _nodes(self, round: int) -> dict[int, int]:
        """The node of each client that is there; a node that is new is asked whose it is."""
        keys = {node.node_id: node.public_key for node in self.grid.get_nodes()}
        online = set(keys)
        self._refused &= online
        # who comes back may have other data
        self._clients = {node: client for node, client in self._clients.items() if node in online}
        self._asked = {message_id: asked for message_id, asked in self._asked.items() if asked[0] in online}
        known = set(self._clients) | self._refused | self._patience.nodes(online, round)
        for node in sorted(online - known - {node for node, _ in self._asked.values()}):
            if message_id := self._push(RecordDict(), node, WHO):
                self._asked[message_id] = node, time.monotonic() + self.timeout
        for message_id, reply in self._pull(self._asked):
            node, _ = self._asked.pop(message_id)
            if _is_away(reply) or node not in keys:
                continue
            problem = _problem(reply) if isinstance(reply, Error) else self._meet(node, keys[node], reply)
            if problem:
                self._refused.add(node)
                log.warning("node %d is refused: %s", node, problem)
        return self._by_client()

    def _meet(self, node: int, public_key: bytes, content: RecordDict) -> str | None:
        who = content.config_records.get("who", ConfigRecord())
        client = who.get("client")
        if type(client) is not int or not 0 <= client < self.template.clients:
            said = client if type(client) is int else str(client)[:40]
            return f"it says that it is client {said!r}, of which there are {self.template.clients}, numbered from 0"
        data = self.template.data
        for name, own in (
            ("split", data.split_sha256),
            ("list of classes", names_sha256(data)),
            ("configuration", self.configuration),
            ("file of weights", self.template.vit.weights_sha256 or "none"),
            ("file of the CNN's weights", self.template.cnn.weights_sha256 or "none"),
        ):
            if who.get(name) != own:
                found = in_a_line(who.get(name))[:12]
                return f"client {client} has another {name} ({found}) than this run ({own[:12]})"
        if others := [other for other, its in self._clients.items() if its == client]:
            return f"it says that it is client {client}, which is at node {others[0]}"
        if problem := self._bindings.meet(client, key_of(public_key)):
            return problem
        self._clients[node] = client
        if self._homes.setdefault(client, node) != node:
            log.warning("client %d was at node %d and is at node %d now", client, self._homes[client], node)
            self._homes[client] = node
        return None


_COLUMNS = ("client", *ENDS, "answered")
NODE_UNAVAILABLE = 5  # of Flower's error codes, which its public modules do not name


def _masking(message: bytes) -> dict[str, ArrayRecord]:
    return {MASKING: ArrayRecord({MASKING: array_of(message)})}


def _missed(client: int, round: int) -> str:
    return f"missed-{client}-{round}"


def _problem(error: Error) -> str:
    """What a node or Flower says went wrong; a node may say it at any length."""
    return in_a_line(error.reason or f"Flower's error {error.code}")


def _is_away(reply: RecordDict | Error) -> bool:
    """Whether Flower has replied itself, because it has not heard of the node for a while."""
    return isinstance(reply, Error) and reply.code == NODE_UNAVAILABLE


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
