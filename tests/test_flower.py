"""The federation on Flower, its grid played by this process: the same numbers, faults, and what crosses the wire."""

from __future__ import annotations

import importlib
import json
import logging
import math
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import CNN, SETTING, Known, Recorder, known, lasting, lasting_rows, outcome, same
from safetensors.torch import load, save, save_file
from test_cli import METHOD
from test_contract import METHODS, budget

pytest.importorskip("flwr")

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.cli.config_utils import load_and_validate
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity

from fedlscl.cli import main
from fedlscl.deployment.flower import client, server, words
from fedlscl.deployment.flower.client import client_app
from fedlscl.deployment.flower.nodes import Bindings, fingerprint, key_of
from fedlscl.deployment.flower.server import FlowerTransport, server_app
from fedlscl.deployment.flower.wire import COST, END, FIT, SECURE, UPLOAD, WHO
from fedlscl.deployment.flower.words import experiment_of
from fedlscl.deployment.shares import deal
from fedlscl.federation.algorithm import Federation, NobodyLeft
from fedlscl.federation.callback import RoundResult
from fedlscl.federation.store import Store
from fedlscl.federation.summing import SecureSums
from fedlscl.messages import Download, Upload
from fedlscl.models.cnn import SmallModel, SmallModelSpec
from fedlscl.models.stored import weights_sha256
from fedlscl.models.vit import FrozenViT
from fedlscl.run.configuration import Configuration

pytestmark = pytest.mark.usefixtures("command_line")

DIGESTS = ("split", "list of classes", "configuration", "file of weights", "file of the CNN's weights")
"""What a node says besides numbers, each a hash."""

Fault = Callable[[Message, Message | None], Message | None]
"""What becomes of a message's reply; the reply is None while the node has not seen the message."""


class Wire(Grid):
    """Nodes that answer at once, each with its own folder, and everything that was sent, as bytes."""

    def __init__(self, words: list[str], nodes: dict[int, dict[str, Any]]) -> None:
        self.words, self.nodes = words, nodes
        self.words_of: dict[int, list[str]] = {}  # where a machine understands the run's words differently
        self.keys: dict[int, bytes] = {}  # as Flower tells them; of nodes in a simulation there are none
        self.offline: set[int] = set()
        self.spoiled: set[str] = set()  # messages whose reply cannot be unpacked
        self.fault: Fault = lambda message, reply: reply
        self.replies: dict[str, Message] = {}
        self.sent: list[tuple[Message, bytes]] = []

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in self.nodes if node not in self.offline]

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node, public_key=self.keys.get(node, b"")) for node in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            name = f"message-{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = name
            self._record(message)
            reply = self.fault(message, None)
            if reply is None and message.metadata.dst_node_id not in self.offline:
                reply = self.fault(message, self._answer(message))
            if reply is not None:
                self._record(reply)
                self.replies[name] = reply
            yield name

    def _record(self, message: Message) -> None:
        self.sent.append((message, b"".join(part.deflate() for part in get_all_nested_objects(message).values())))

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        run = {"words": shlex.join(self.words_of.get(node, self.words)), "data": "", "timeout": 1.0}
        context = Context(0, node, self.nodes[node], RecordDict(), run)  # type: ignore[arg-type]
        try:
            return client_app(message, context)
        except Exception as error:
            return Message(Error(2, f"{type(error)}:<'{error}'>"), reply_to=message)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        if self.spoiled.intersection(message_ids):
            raise RuntimeError("unexpected object type")
        return [self.replies.pop(name) for name in message_ids if name in self.replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError


class Clock:
    """Time that passes where somebody waits and nowhere else, however long this machine takes."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nodes answer without the process and the waiting that they have on Flower."""
    for module in (client, server, words):
        monkeypatch.setattr(module, "Configuration", Known)
    monkeypatch.setattr(server, "time", Clock())
    for name in ("run_id", "task_id", "node_id"):  # as Flower sets them in the process of an app; nodes begin at 100
        monkeypatch.setattr(TaskIdentity, f"_{name}", 0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once(monkeypatch)


@pytest.fixture(autouse=True, scope="module")
def _forget() -> Iterator[None]:
    yield
    for cached in (known, client._place):
        cached.cache_clear()


@dataclass
class Ground:
    """What is the same wherever one configuration runs: its files and shares, and its runs in one process."""

    folder: Path
    words: list[str]
    known: dict[Any, list[RoundResult]] = field(default_factory=dict)


def prepare(folder: Path, method: list[str], rounds: int = 1) -> Ground:
    """Write the setting and deal the data."""
    setting = {**SETTING, "data": {**SETTING["data"], "cache_dir": str(folder)}, "federation": {"rounds": rounds}}
    (folder / "setting.yaml").write_text(yaml.safe_dump(setting))
    return dealt(folder, ["--config", str(folder / "setting.yaml"), *method, "--run_dir", "nodes"])


def dealt(folder: Path, words: list[str]) -> Ground:
    """Deal the data of a configuration."""
    experiment = Known(words).build()
    experiment.load()
    for _ in deal(experiment.data, experiment.server.server_images, folder / "dealt"):
        pass
    return Ground(folder, words)


class Place:
    """One configuration, in one process and on Flower; `folder` is the working directory.

    The nodes' words and paths are the same in every test, so that what they build from them is built once.
    """

    def __init__(self, folder: Path, ground: Ground) -> None:
        self.folder, self.known, self.words = folder, ground.known, [*ground.words]
        self.experiment = Known(self.words).build()
        self.experiment.load()
        shutil.copytree(ground.folder / "dealt", folder / "shares")
        nodes = {100 + n: {"client": n, "data": f"shares/client-{n}"} for n in range(3)}
        self.wire = Wire([*self.words], nodes)

    def in_process(self) -> Federation:
        return replace(self.experiment, run_dir=self.folder / "whole").federation()

    def expected(self, failure: tuple[int, int] | None = None) -> list[RoundResult]:
        """The run in one process, where a client fails in one round if `failure` names them; made once."""
        if failure not in self.known:
            federation = self.in_process()
            fit = federation.transport.worker.fit

            def broken(body: Any, now: Any, logger: Any) -> Any:
                if (body.index, now.number) == failure:
                    raise FloatingPointError("training diverged")
                return fit(body, now, logger)

            federation.transport.worker.fit = broken  # type: ignore[method-assign]
            self.known[failure] = run(federation)
        return deepcopy(self.known[failure])

    def on_flower(self, timeout: float = 5.0, **more: Any) -> Federation:
        """The server with its share alone, where its run folder stands."""
        experiment = experiment_of(shlex.join(self.words), str(self.folder / "shares" / "server"))
        configuration = Configuration(self.words).sha256
        transport = partial(FlowerTransport, grid=self.wire, configuration=configuration, timeout=timeout, **more)
        return replace(experiment, run_dir=self.folder / "server", transport=transport).federation()


def run(federation: Federation, stop: int | None = None, results: list[RoundResult] | None = None) -> list[RoundResult]:
    results = [] if results is None else results
    for result in federation.run(Recorder()):
        results.append(result)
        if result.round == stop:
            break
    return results


@pytest.fixture(scope="module")
def method(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("method") / "method.yaml"
    path.write_text(yaml.safe_dump(METHOD))
    return ["--config", str(path)]


@pytest.fixture(scope="module")
def grounds() -> list[Ground]:
    """What is common to the places, once there has been one."""
    return []


@pytest.fixture
def place(tmp_path: Path, method: list[str], grounds: list[Ground], tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Three clients, two tasks of two rounds."""
    if not grounds:
        grounds.append(prepare(tmp_path_factory.mktemp("ground"), method, rounds=2))
    return Place(tmp_path, grounds[0])


# ---- the same numbers


def test_the_command_and_the_apps_write_the_same_summary(place: Place) -> None:
    """Metrics of the clients' training, counted operations and all."""
    main(["fit", *place.words, "--run_dir", "one"])
    of_server = place.folder / "shares" / "server"
    run_config = {"words": f"{shlex.join(place.words)} --run_dir other", "data": str(of_server), "timeout": 5.0}
    server_app(place.wire, Context(0, 0, {}, RecordDict(), run_config))  # type: ignore[arg-type]
    one, other = (json.loads(Path(name, "summary.json").read_text()) for name in ("one", "other"))
    assert lasting(one) == lasting(other)
    assert one["compute"]["resnet18"]["flops"] > 0

    def by_name(folder: str) -> list[tuple[str, ...]]:
        return sorted(tuple(row.values()) for row in lasting_rows(Path(folder)))

    assert by_name("one") == by_name("other")
    assert any("collaborate/cross_entropy" in name for row in by_name("other") for name in row)


def test_some_clients_may_be_absent_from_a_round(place: Place) -> None:
    place.words += ["--federation.clients_per_round", "2"]
    place.wire.words += ["--federation.clients_per_round", "2"]
    place.experiment = Configuration(place.words).build()
    place.experiment.load()
    assert outcome(run(place.on_flower())) == outcome(run(place.in_process()))


# ---- what crosses the wire


def test_nothing_crosses_the_wire_but_the_messages_and_numbers(place: Place) -> None:
    federation = place.on_flower()
    results = run(federation)
    template, up, down = federation.template, 0, 0
    for message, data in place.wire.sent:
        content = message.content
        arrays = [array for record in content.array_records.values() for array in record.values()]
        assert {array.stype for array in arrays} <= {"safetensors"}
        for array in arrays:
            if message.metadata.src_node_id:  # of a node
                upload = Upload.from_bytes(array.data, template.first.upload_schema())
                assert set(upload.tensors) == set(template.first.upload_schema())
                up += len(array.data)
            else:
                assert set(load(array.data)) <= set(template.first.download_schema())
                down += len(array.data)
        for record in [*content.config_records.values(), *content.metric_records.values()]:
            for name, value in record.items():
                flat = value if isinstance(value, list) else [value]
                assert all(isinstance(number, int | float) for number in flat) or name in DIGESTS
        # and nothing is hidden beside that: names, numbers and Flower's own account take little
        assert len(data) - sum(len(array.data) for array in arrays) < 4096
    assert up == sum(sum(result.bytes_up.values()) for result in results)
    starts = 3 * len(template.start_message(0))
    assert down == sum(sum(result.bytes_down.values()) for result in results) + starts
    kinds = [message.metadata.message_type for message, _ in place.wire.sent]
    assert {kind: kinds.count(kind) for kind in kinds} == {WHO: 2 * 3, FIT: 2 * 3 * 4, END: 2 * 3 * 4}


def test_metrics_of_training_stay_where_they_are_not_wanted(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """The run's words hold for all nodes, and a node's own words for it."""
    place.wire.words += ["--tracking.clients", "none"]
    place.wire.nodes[101]["words"] = "--tracking.clients all"
    run(place.on_flower(), stop=1)
    sent = {
        message.metadata.src_node_id: set(message.content.metric_records["metrics"])
        for message, _ in place.wire.sent
        if message.metadata.src_node_id and "metrics" in message.content.metric_records
    }
    assert "collaborate/cross_entropy" in sent.pop(101)
    assert sent == {100: set(), 102: set()}


def test_a_node_takes_no_start_that_the_server_has_chosen(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """Zeros, say, which keep a client's CNN as it was drawn; last bits may differ."""
    federation = place.on_flower()
    common = federation.template.common_start
    honest = {name: tensor.clone() for name, tensor in common.items()}
    common.update({name: torch.zeros_like(tensor) for name, tensor in honest.items()})
    with pytest.raises(NobodyLeft, match=r"client 0, 1, 2: MessageError$"):
        run(federation, stop=1)
    assert "the server's 'weight' for all clients to start with is up to 0." in caplog.text
    common.update({name: tensor * (1 + 1e-6) for name, tensor in honest.items()})
    (result,) = run(federation, stop=1)
    assert result.skipped == {}


# ---- secure sums


@pytest.fixture(scope="module")
def secure_ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    ridge = next(path for path in METHODS if path.stem == "fed_ridge")
    words = ["--config", str(ridge), "--federation.secure", "true"]
    return prepare(tmp_path_factory.mktemp("secure"), words, rounds=1)


@pytest.fixture
def secure_place(tmp_path: Path, secure_ground: Ground) -> Place:
    """The same clients; of a head in closed form, whose sums are secure."""
    return Place(tmp_path, secure_ground)


def test_secure_sums_have_the_numbers_of_one_process(secure_place: Place) -> None:
    federation = secure_place.on_flower()
    assert outcome(run(federation)) == outcome(secure_place.expected())
    kinds = [message.metadata.message_type for message, _ in secure_place.wire.sent]
    assert {kind: kinds.count(kind) for kind in kinds} == {WHO: 6, SECURE: 2 * 3 * 3 * 2, FIT: 12, END: 12}
    # what the nodes sent was masked: of class sums there is nothing
    for message, _ in secure_place.wire.sent:
        if message.metadata.message_type == FIT and message.metadata.src_node_id:
            tensors = load(message.content.array_records[UPLOAD][UPLOAD].data)
            assert set(tensors) == {"session", "masked"}
    for node in range(3):  # no secret outlives its round
        state = Store(secure_place.folder / "nodes" / f"client-{node}").read("secure-2")
        assert state is not None
        assert set(state) == {"done"}


def test_a_round_without_a_secure_sum_is_only_ended(tmp_path: Path) -> None:
    """In the second round of a task a head in closed form has nothing to send; nor where the server starts anew."""
    ridge = next(path for path in METHODS if path.stem == "fed_ridge")
    (tmp_path / "ground").mkdir()
    words = ["--config", str(ridge), "--federation.secure", "true"]
    place = Place(tmp_path, prepare(tmp_path / "ground", words, rounds=2))
    before = run(place.on_flower(), stop=1)
    assert outcome([*before, *run(place.on_flower())]) == outcome(place.expected())
    sent = [message for message, _ in place.wire.sent]
    kinds = [{kind for kind in (SECURE, FIT, END) if any(in_round(m, n, {kind}) for m in sent)} for n in range(1, 5)]
    assert kinds == [{SECURE, FIT, END}, {END}, {SECURE, FIT, END}, {END}]


@pytest.mark.parametrize("kind", [SECURE, FIT])
def test_who_drops_out_of_a_secure_sum_goes_on_as_if_the_fit_had_failed(secure_place: Place, kind: str) -> None:
    expected = secure_place.expected(failure=(1, 1))
    secure_place.wire.fault = lambda message, reply: None if reply and in_round(message, 1, {kind}) else reply
    found = run(secure_place.on_flower(timeout=1.0))
    for one, other in zip(expected, found, strict=True):
        assert one.accuracy == other.accuracy
        assert set(one.skipped) == set(other.skipped) == ({1} if one.round == 1 else set())
    assert found[0].skipped[1] == NO_REPLY


def test_a_mean_that_is_trained_on_is_that_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server knows how many images each client has, by which it chooses the bits."""
    fedvit = next(path for path in METHODS if path.stem == "fedvit")
    words = ["--config", str(fedvit), "--federation.secure", "true"]
    (tmp_path / "ground").mkdir()
    place = Place(tmp_path, prepare(tmp_path / "ground", words, rounds=2))
    chosen: list[tuple[int | None, list[int]]] = []
    bits = SecureSums.bits

    def note(self: SecureSums, clients: int, images: int | None) -> list[int]:
        chosen.append((images, bits(self, clients, images)))
        return chosen[-1][1]

    monkeypatch.setattr(SecureSums, "bits", note)
    assert outcome(run(place.on_flower())) == outcome(place.expected())
    assert len(chosen) == 8
    assert chosen[:4] == chosen[4:]
    assert None not in [images for images, _ in chosen]


def test_a_server_that_is_killed_in_a_secure_sum_repeats_the_round(secure_place: Place) -> None:
    class Killed(BaseException):
        pass

    asked: list[bytes] = []

    def kill(message: Message, reply: Message | None) -> Message | None:
        if reply is not None and in_round(message, 2, {SECURE}):
            asked.append(message.content.array_records["masking"]["masking"].data)
            if len(asked) == 3:  # to unmask
                raise Killed
        return reply

    secure_place.wire.fault = kill
    before: list[RoundResult] = []
    with pytest.raises(Killed):
        run(secure_place.on_flower(), results=before)
    secure_place.wire.replies.clear()
    found = outcome([*before, *run(secure_place.on_flower())])
    assert found == outcome(secure_place.expected())
    assert len({load(message)["session"].numpy().tobytes() for message in asked}) == 2


def test_a_node_takes_no_step_of_a_secure_sum_twice(secure_place: Place) -> None:
    """A server that asks a second time, for the shares of another sum say, learns nothing more."""
    run(secure_place.on_flower(), stop=1)
    asked = [m for m, _ in secure_place.wire.sent if m.metadata.message_type == SECURE and in_round(m, 1, {SECURE})]
    for message in asked[1:]:
        reply = secure_place.wire._answer(message)
        assert reply.has_error()
        assert reply.error.reason == "MessageError"


# ---- faults


def in_round(message: Message, round: int, kinds: Iterable[str], node: int = 101) -> bool:
    """Whether this is the server's message of a kind to a node in a round."""
    return (
        message.metadata.dst_node_id == node
        and message.metadata.message_type in kinds
        and message.content.config_records["round"]["round"] == round
    )


NO_REPLY = "TimeoutError: no reply within 1 s"


def test_clients_without_exchange_are_sent_back_as_well(tmp_path: Path) -> None:
    """No upload tells the server that a client has trained; here the end of round 1 is not heard by one."""
    local = next(path for path in METHODS if path.stem == "local")
    place = Place(tmp_path, prepare(tmp_path, ["--config", str(local), *budget(local)], rounds=2))
    expected = place.expected()
    place.wire.fault = lambda message, reply: None if reply and in_round(message, 1, {END}) else reply
    found = run(place.on_flower(timeout=1.0), stop=1) + run(place.on_flower())
    assert [result.accuracy for result in found[1:]] == [result.accuracy for result in expected[1:]]


@pytest.mark.parametrize("kinds", [{FIT}, {FIT, END}], ids=["fit", "fit and end"])
@pytest.mark.parametrize("seen", [False, True], ids=["message lost", "reply lost"])
@pytest.mark.parametrize("round", [2, 3])
def test_who_was_away_in_a_round_goes_on_as_if_the_fit_had_failed(
    place: Place, kinds: set[str], seen: bool, round: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether its node was dead or its answer came too late: what it did then does not count, and it catches up."""
    expected = place.expected(failure=(1, round))

    def drop(message: Message, reply: Message | None) -> Message | None:
        if reply is None:
            return None
        return None if in_round(message, round, kinds) else reply

    place.wire.fault = drop
    answer = place.wire._answer
    if not seen:

        def deaf(message: Message) -> Message:
            return Message(RecordDict(), reply_to=message) if in_round(message, round, kinds) else answer(message)

        monkeypatch.setattr(place.wire, "_answer", deaf)
    found = run(place.on_flower(timeout=1.0))
    for one, other in zip(expected, found, strict=True):
        assert one.bytes_up == other.bytes_up
        assert one.bytes_down == other.bytes_down
        assert set(one.skipped) == set(other.skipped) == ({1} if one.round == round else set())
        for mask, accuracy in other.accuracy.items():
            if one.round == round and END in kinds:
                assert all(math.isnan(value) for value in accuracy[1])
                accuracy[1] = one.accuracy[mask][1]
        assert one.accuracy == other.accuracy
    assert found[round - 1].skipped[1] == NO_REPLY


@pytest.mark.parametrize("seen", [False, True], ids=["message lost", "reply lost"])
def test_who_missed_the_end_of_a_round_keeps_what_it_learned_in_it(
    place: Place, seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its upload counts; the answer reaches it with the next message."""
    expected = place.expected()
    answer = place.wire._answer

    def deaf(message: Message) -> Message:
        if in_round(message, 2, {END}) and not seen:
            return Message(RecordDict(), reply_to=message)
        return answer(message)

    monkeypatch.setattr(place.wire, "_answer", deaf)
    place.wire.fault = lambda message, reply: None if reply and in_round(message, 2, {END}) else reply
    found = run(place.on_flower(timeout=1.0))
    for mask, accuracy in found[1].accuracy.items():
        assert all(math.isnan(value) for value in accuracy[1])
        accuracy[1] = expected[1].accuracy[mask][1]
    assert outcome(found) == outcome(expected)


@pytest.mark.parametrize("kind", [FIT, END])
@pytest.mark.parametrize("round", [1, 2, 3])
def test_a_server_that_is_killed_in_a_round_goes_on_from_its_beginning(place: Place, kind: str, round: int) -> None:
    """The clients have gone further, and are sent back."""
    expected = outcome(place.expected())

    class Killed(BaseException):
        pass

    def kill(message: Message, reply: Message | None) -> Message | None:
        if reply is not None and in_round(message, round, {kind}):
            raise Killed
        return reply

    place.wire.fault = kill
    before: list[RoundResult] = []
    with pytest.raises(Killed):
        run(place.on_flower(), results=before)
    assert len(before) == round - 1
    place.wire.fault = lambda message, reply: reply
    place.wire.replies.clear()
    assert outcome([*before, *run(place.on_flower())]) == expected


def test_a_node_that_comes_late_is_waited_for(place: Place) -> None:
    place.wire.offline = {102}
    ids, calls = place.wire.get_node_ids, iter(range(100))

    def appearing() -> Iterable[int]:
        if next(calls) == 5:
            place.wire.offline.clear()
        return ids()

    place.wire.get_node_ids = appearing  # type: ignore[method-assign]
    assert [result.skipped for result in run(place.on_flower(), stop=1)] == [{}]


def test_a_client_without_a_node_is_left_out_by_name(place: Place) -> None:
    place.wire.offline = {102}
    (result,) = run(place.on_flower(timeout=0.5), stop=1)
    assert result.skipped == {2: "TimeoutError: no node of this client within 0.5 s"}
    assert all(math.isnan(values[0]) for values in (result.accuracy[mask][2] for mask in result.accuracy))


def changed(content: RecordDict, **records: Any) -> RecordDict:
    return RecordDict({**content, **records})


def payload(data: bytes, stype: str = "safetensors") -> ArrayRecord:
    return ArrayRecord({"upload": Array("uint8", (len(data),), stype, data)})


def with_nan(content: RecordDict) -> RecordDict:
    data = content.array_records["upload"]["upload"].data
    header = 8 + int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8:header])["__metadata__"]
    tensors = load(data)
    tensors["weight"][0, 0] = math.nan
    return changed(content, upload=payload(save(tensors, metadata)))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (with_nan, "MessageError: upload: tensor 'weight' holds NaN or infinite values"),
        (lambda c: changed(c, upload=payload(b"\x80\x04garbage")), "MessageError: upload is truncated or not in the"),
        (lambda c: changed(c, upload=payload(b"", "numpy.ndarray")), "ValueError: the reply holds no 'upload'"),
        (lambda c: RecordDict(), "ValueError: the reply holds no 'upload'"),
        (lambda c: changed(c, metrics=MetricRecord({"loss": [1.0]})), "ValueError: metrics: loss is [1.0], must be a"),
        (lambda c: changed(c, metrics=MetricRecord({"loss": math.nan})), "ValueError: metrics: loss is nan, must be a"),
        (lambda c: changed(c, metrics=MetricRecord({"a b": 1.0})), "ValueError: metrics: 'a b' is no name of a metric"),
        (
            lambda c: changed(c, metrics=MetricRecord({f"m{n}": 1.0 for n in range(65)})),
            "ValueError: metrics: 'm64' is no name of a metric, or one too many",
        ),
    ],
    ids=["NaN", "garbage", "another format", "nothing", "odd metric", "NaN metric", "odd name", "many metrics"],
)
def test_a_node_that_answers_garbage_is_refused_by_name(
    place: Place, change: Callable[[RecordDict], RecordDict], complaint: str
) -> None:
    def tamper(message: Message, reply: Message | None) -> Message | None:
        if reply is not None and in_round(message, 2, {FIT}):
            return Message(change(reply.content), reply_to=message)
        return reply

    place.wire.fault = tamper
    results = run(place.on_flower(), stop=3)
    assert [set(result.skipped) for result in results] == [set(), {1}, set()]
    assert results[1].skipped[1].startswith(complaint)
    assert set(results[1].bytes_down) == {0, 2}


@pytest.mark.parametrize("values", [[101.0, 3.0], [1.0], [1.0, -0.5], None], ids=str)
def test_an_impossible_accuracy_is_not_taken(
    place: Place, values: list[float] | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the number there is none for this client in this round, and all goes on."""

    def tamper(message: Message, reply: Message | None) -> Message | None:
        if reply is not None and in_round(message, 3, {END}):
            told = {} if values is None else {**reply.content.metric_records["accuracy"], "seen": values}
            return Message(RecordDict({"accuracy": MetricRecord(told)}), reply_to=message)
        return reply

    place.wire.fault = tamper
    with caplog.at_level(logging.WARNING, logger="fedlscl"):
        results = run(place.on_flower())
    assert "client 1 has not ended round 3: ValueError: accuracy under mask" in caplog.text
    unknown = [[math.isnan(values[0]) for values in result.accuracy["task"]] for result in results]
    assert unknown == [[False] * 3, [False] * 3, [False, True, False], [False] * 3]


def test_a_client_that_fails_tells_the_type_alone(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """Here because its disk was lost, so that it cannot go on from the round that the server names.

    The text, which may name files, stays in the log of its own machine.
    """
    federation = place.on_flower()
    run(federation, stop=2)
    state = place.folder / "nodes" / "client-1"
    for path in state.iterdir():
        path.unlink()
    with caplog.at_level(logging.WARNING, logger="fedlscl"):
        (result,) = run(place.on_flower(), stop=3)
    assert result.skipped == {1: "LookupError"}
    (at_node, *_) = [r for r in caplog.records if r.name.endswith("flower.client")]
    assert "client 1 lacks end-2, from which the server goes on; it has nothing" in at_node.getMessage()
    everything = b"".join(data for message, data in place.wire.sent if message.metadata.src_node_id)
    assert b"lacks end-2" not in everything
    assert str(place.folder).encode() not in everything


# ---- nodes that do not belong


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"client": 3}, "it says that it is client 3, of which there are 3, numbered from 0"),
        ({"client": "1"}, "client is '1' in the node's configuration, must be a number: client=0"),
        ({"client": 1}, "it says that it is client 1, which is at node 101"),
        ({"client": 1, "data": "elsewhere"}, "elsewhere holds no share of a federation's data"),
    ],
    ids=["no such client", "no number", "twice", "no data"],
)
def test_a_node_that_does_not_belong_is_refused_and_nobody_else_notices(
    place: Place, config: dict[str, Any], complaint: str, caplog: pytest.LogCaptureFixture
) -> None:
    place.wire.nodes[200] = {"data": str(place.folder / "shares" / "client-1"), **config}
    with caplog.at_level(logging.WARNING, logger="fedlscl"):
        (result,) = run(place.on_flower(), stop=1)
    assert result.skipped == {}
    assert "node 200 is refused: " in caplog.text
    assert complaint in caplog.text


def test_data_of_another_split_are_refused(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    other = Configuration([*place.words, "--seed_everything", "8"]).build()
    other.load()
    for _ in deal(other.data, 0, place.folder / "others"):
        pass
    place.wire.nodes[101]["data"] = str(place.folder / "others" / "client-1")
    with caplog.at_level(logging.WARNING, logger="fedlscl"):
        (result,) = run(place.on_flower(timeout=1.0), stop=1)
    assert set(result.skipped) == {1}
    assert f"client 1 has another split ({other.data.split_sha256[:12]}) than this run" in caplog.text


def test_other_names_of_the_classes_are_refused(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """A share need not have been dealt; with the classes in another order its labels would mean something else."""
    path = place.folder / "shares" / "client-1" / "share.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "classes": content["classes"][::-1]}))
    with caplog.at_level(logging.WARNING, logger="fedlscl"):
        (result,) = run(place.on_flower(timeout=1.0), stop=1)
    assert set(result.skipped) == {1}
    assert "client 1 has another list of classes (" in caplog.text


def test_other_weights_are_refused_and_the_same_ones_may_lie_elsewhere(
    tmp_path: Path, method: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    state = {name: tensor.contiguous() for name, tensor in FrozenViT(**SETTING["backbone"]).vit.state_dict().items()}
    for name, changed in (("own", 0.0), ("same", 0.0), ("other", 0.1)):
        save_file({**state, "pos_embed": state["pos_embed"] + changed}, tmp_path / f"{name}.safetensors")
    place = Place(tmp_path, prepare(tmp_path, [*method, "--backbone.weights", str(tmp_path / "own.safetensors")]))
    for node, name in ((100, "same"), (101, "other")):
        place.wire.nodes[node]["words"] = shlex.join(["--backbone.weights", str(tmp_path / f"{name}.safetensors")])
    # a server that sees no difference, or says so, is refused by a node that does
    place.wire.nodes[100]["weights"] = weights_sha256("backbone", str(tmp_path / "own.safetensors"))
    place.wire.nodes[102]["weights"] = other = weights_sha256("backbone", str(tmp_path / "other.safetensors"))
    with caplog.at_level(logging.WARNING, logger="fedlscl"):
        (result,) = run(place.on_flower(timeout=1.0), stop=1)
    assert set(result.skipped) == {1, 2}
    assert "client 1 has another file of weights (" in caplog.text
    assert "node 102 is refused: OtherWeights" in caplog.text
    assert f"and weights in the node's configuration is {other}" in caplog.text


def test_a_small_model_that_begins_elsewhere_is_refused(
    tmp_path: Path, method: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    state = SmallModel(SmallModelSpec(**CNN), "resnet18").backbone.state_dict()
    for name, changed in (("own", 0.0), ("same", 0.0), ("other", 0.1)):
        save_file({**state, "bn1.bias": state["bn1.bias"] + changed}, tmp_path / f"{name}.safetensors")
    place = Place(tmp_path, prepare(tmp_path, [*method, "--cnn.weights", str(tmp_path / "own.safetensors")]))
    for node, name in ((100, "same"), (101, "other")):
        place.wire.nodes[node]["words"] = shlex.join(["--cnn.weights", str(tmp_path / f"{name}.safetensors")])
    with caplog.at_level(logging.WARNING, logger="fedlscl"):
        (result,) = run(place.on_flower(timeout=1.0), stop=1)
    assert set(result.skipped) == {1}
    assert "client 1 has another file of the CNN's weights (" in caplog.text
    assert (
        "computes its features with whatever frozen model the run's words name (file of weights: none)" in caplog.text
    )


def test_a_node_cannot_be_a_client_whose_data_it_does_not_have(place: Place) -> None:
    place.wire.nodes[101]["data"] = str(place.folder / "shares" / "client-2")
    (result,) = run(place.on_flower(), stop=1)
    assert result.skipped == {1: "NotThisClient"}


# ---- the run's configuration


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"timeout": 0.0}, "timeout is 0.0, must be a positive number of seconds"),
        ({"timeout": "soon"}, "timeout is 'soon', must be a positive number of seconds"),
        ({"words": "--config 'open"}, "words of the run or the node: No closing quotation"),
        ({"words": "--config nowhere.yaml"}, "words of the run or the node: .*nowhere.yaml"),
        ({"words": "--config digits --federation.rounds nope"}, "words of the run or the node: .*rounds"),
        ({"data": "nowhere"}, "nowhere holds no share of a federation's data"),
        ({"clients": "0=mine"}, "clients has the entry '0=mine', must be a client from 0 to 2 and the fingerprint"),
        ({"patience": 0}, "patience is 0, must be a whole number of rounds from 1 on"),
    ],
)
def test_a_wrong_configuration_is_named(place: Place, config: dict[str, Any], complaint: str) -> None:
    run_config = {"words": shlex.join(place.words), "data": "", "timeout": 1.0, **config}
    with pytest.raises((ValueError, OSError), match=complaint):
        server_app(place.wire, Context(0, 0, {}, RecordDict(), run_config))  # type: ignore[arg-type]
    assert place.wire.sent == []


def test_in_a_simulation_the_number_is_that_of_the_partition(place: Place) -> None:
    """And the data are those of the configuration."""
    place.wire.nodes = {n: {"partition-id": n, "num-partitions": 3} for n in range(7, 10)}
    for n, config in enumerate(place.wire.nodes.values()):
        config["partition-id"] = n
    assert outcome(run(place.on_flower(), stop=2)) == outcome(place.expected()[:2])


def test_a_download_that_was_missed_is_kept_until_it_is_heard(place: Place) -> None:
    """In the server's store, across a restart, to the same bytes."""
    place.wire.fault = lambda message, reply: None if reply and in_round(message, 1, {END}) else reply
    federation = place.on_flower(timeout=1.0)
    run(federation, stop=1)
    kept = federation.store.read("missed-1-1")
    assert kept is not None
    sent = [m for m, _ in place.wire.sent if in_round(m, 1, {END})]
    told = Download.from_bytes(
        sent[0].content.array_records["downloads"]["1"].data, federation.template.first.download_schema()
    )
    assert same(kept, told.tensors)
    run(place.on_flower(timeout=1.0), stop=2)
    again = [m for m, _ in place.wire.sent if in_round(m, 2, {FIT})]
    data = again[0].content.array_records["downloads"]["1"].data
    assert data == sent[0].content.array_records["downloads"]["1"].data
    assert place.on_flower().store.read("missed-1-1") is None
    assert torch.equal(place.on_flower().store.read("clients")["since"], torch.tensor([2, 2, 2]))  # type: ignore[index]


def test_counts_of_nobody_are_none(place: Place) -> None:
    federation = place.on_flower(timeout=0.3)
    place.wire.offline = {100, 101, 102}
    assert federation.cost() == {}
    place.wire.offline = set()
    assert set(federation.cost()["resnet18"]) == {"trained_parameters", "flops_frozen", "flops"}
    assert place.wire.sent[-1][0].metadata.message_type == COST


def test_config_records_hold_no_names(place: Place) -> None:
    """Numbers alone tell a client about the round."""
    run(place.on_flower(), stop=1)
    fits = [m for m, _ in place.wire.sent if m.metadata.message_type == FIT and not m.metadata.src_node_id]
    records = [message.content.config_records["round"] for message in fits]
    assert {name for record in records for name in record} == {
        *("client", "task", "round", "since", "uploads", "ends_task")
    }
    assert isinstance(records[0], ConfigRecord)


def test_a_run_in_which_a_client_was_lost_at_the_end_has_its_numbers_without_it(place: Place) -> None:
    """Averages are those of the others, and what is unknown is null."""
    place.wire.fault = lambda message, reply: None if reply and in_round(message, 4, {FIT, END}) else reply
    of_server = place.folder / "shares" / "server"
    run_config = {"words": f"{shlex.join(place.words)} --run_dir run", "data": str(of_server), "timeout": 1.0}
    server_app(place.wire, Context(0, 0, {}, RecordDict(), run_config))  # type: ignore[arg-type]

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    summary = json.loads(Path("run", "summary.json").read_text(), parse_constant=refuse)
    matrix = summary["accuracy"]["seen"]["matrix"]
    assert matrix[1][1] == [None, None]
    others = [sum(matrix[client][1]) / 2 for client in (0, 2)]
    assert summary["accuracy"]["seen"]["final_average"] == pytest.approx(sum(others) / 2)
    assert summary["skipped"] == [{"round": 4, "client": 1, "reason": NO_REPLY}]
    assert not any(row["value"] == "nan" for row in lasting_rows(Path("run")))


# ---- what Flower itself may do


def test_a_reply_that_cannot_be_unpacked_harms_its_sender_alone(place: Place) -> None:
    def spoil(message: Message, reply: Message | None) -> Message | None:
        if reply is not None and in_round(message, 2, {FIT}):
            place.wire.spoiled.add(message.metadata.message_id)
        return reply

    place.wire.fault = spoil
    results = run(place.on_flower(), stop=3)
    assert [result.skipped for result in results] == [{}, {1: "RuntimeError: unexpected object type"}, {}]


def test_what_a_node_sends_unasked_is_nobodys_reply(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower hands it over whichever reply is asked for, and before it."""
    pull = place.wire.pull_messages
    forged = Message(RecordDict(), reply_to=Message(RecordDict(), 101, FIT))
    monkeypatch.setattr(place.wire, "pull_messages", lambda ids: [forged, *pull(ids), forged])
    assert outcome(run(place.on_flower())) == outcome(place.expected())


def test_a_second_reply_to_a_message_is_ignored(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    pull = place.wire.pull_messages
    monkeypatch.setattr(place.wire, "pull_messages", lambda ids: [*(replies := list(pull(ids))), *replies])
    assert outcome(run(place.on_flower())) == outcome(place.expected())


def test_of_what_a_node_says_a_line_is_kept(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    place.wire.nodes[200] = {"client": 0}
    place.wire._answer = talkative(place.wire._answer)  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING, logger="fedlscl"):
        results = run(place.on_flower(), stop=2)
    assert results[1].skipped[1].startswith("xxxx")
    assert len(results[1].skipped[1]) == 500
    assert "node 200 is refused: it says that it is client 'xxxx" in caplog.text
    assert max(len(record.getMessage()) for record in caplog.records) < 1000


def talkative(answer: Callable[[Message], Message]) -> Callable[[Message], Message]:
    """Node 200 says at length whose it is, client 1 at length why it fails."""

    def say(message: Message) -> Message:
        if message.metadata.dst_node_id == 200:
            return Message(RecordDict({"who": ConfigRecord({"client": "x" * 10**6})}), reply_to=message)
        if in_round(message, 2, {FIT}):
            return Message(Error(2, "x" * 10**6), reply_to=message)
        return answer(message)

    return say


def test_a_task_whose_end_nobody_confirms_ends_the_run_with_the_reason(place: Place) -> None:
    """The next start repeats the round."""
    expected = outcome(place.expected())

    def lose(message: Message, reply: Message | None) -> Message | None:
        numbers = message.content.config_records.get("round")
        lost = message.metadata.message_type == END and numbers is not None and numbers["round"] == 2
        return None if lost else reply

    place.wire.fault = lose
    with pytest.raises(RuntimeError, match="no client has ended round 2, the last of its task"):
        run(place.on_flower(timeout=0.5))
    place.wire.fault = lambda message, reply: reply
    assert outcome(run(place.on_flower())) == expected[1:]


def test_a_message_that_flower_does_not_take_is_sent_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    push, count = place.wire.push_messages, iter(range(1000))
    monkeypatch.setattr(place.wire, "push_messages", lambda m: push(m) if next(count) % 3 else [])
    assert outcome(run(place.on_flower())) == outcome(place.expected())


def test_a_node_that_flower_has_lost_for_a_while_gets_its_message_again(place: Place) -> None:
    lost = iter(range(1000))

    def away(message: Message, reply: Message | None) -> Message | None:
        if reply is not None and in_round(message, 2, {FIT, END}) and next(lost) % 2 == 0:
            return Message(Error(5, "Node Unavailable"), reply_to=message)
        return reply

    place.wire.fault = away
    assert outcome(run(place.on_flower())) == outcome(place.expected())
    assert next(lost) == 4


def test_who_stays_away_holds_nobody_up(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the exchange in which it is missed first it has until the time-out, and no time in the next."""
    place.wire.offline = {102}
    slept = []
    monkeypatch.setattr(server.time, "sleep", slept.append)
    now = iter(range(10**9))
    monkeypatch.setattr(server.time, "monotonic", lambda: next(now) / 10)
    federation = place.on_flower(timeout=50)
    rounds = federation.run(Recorder())
    assert next(rounds).skipped == {2: "TimeoutError: no node of this client within 50 s"}
    assert len(slept) > 100
    slept.clear()
    assert set(next(rounds).skipped) == {2}
    assert len(slept) < 10
    place.wire.offline = set()
    assert next(rounds).skipped == {}


def test_who_says_slowly_whose_it_is_takes_part_in_the_next_round(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait for nobody who was not there before."""
    place.wire.offline = {102}
    federation = place.on_flower(timeout=0.5)
    rounds = federation.run(Recorder())
    assert set(next(rounds).skipped) == {2}
    place.wire.offline, federation.transport.timeout = set(), 60.0  # type: ignore[attr-defined]
    pull, polls = place.wire.pull_messages, iter(range(1000))
    slow = len(place.wire.sent)  # the number of its next message to node 102, which is the first that is new

    def later(ids: Iterable[str]) -> Iterable[Message]:
        return [] if f"message-{slow}" in ids and next(polls) < 2 else pull(ids)

    monkeypatch.setattr(place.wire, "pull_messages", later)
    assert next(rounds).skipped == {2: "TimeoutError: no node of this client since an earlier message"}
    assert next(rounds).skipped == {}


def test_who_comes_back_is_asked_again_what_it_has(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    federation = place.on_flower(timeout=0.5)
    rounds = federation.run(Recorder())
    assert next(rounds).skipped == {}
    place.wire.offline = {101}
    assert set(next(rounds).skipped) == {1}
    path = place.folder / "shares" / "client-1" / "share.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "classes": content["classes"][::-1]}))
    place.wire.offline = set()
    with caplog.at_level(logging.WARNING, logger="fedlscl"):
        assert set(next(rounds).skipped) == {1}
    assert "node 101 is refused: client 1 has another list of classes" in caplog.text


def test_a_client_that_moves_to_another_node_is_on_record(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    federation = place.on_flower()
    rounds = federation.run(Recorder())
    next(rounds)
    place.wire.nodes[200] = place.wire.nodes.pop(101)
    with caplog.at_level(logging.WARNING, logger="fedlscl"):
        assert next(rounds).skipped == {}
    assert "client 1 was at node 101 and is at node 200 now" in caplog.text


def test_a_node_that_has_become_another_client_is_not_taken_for_the_first(place: Place) -> None:
    run(place.on_flower(), stop=1)
    federation = place.on_flower()
    rounds = federation.run(Recorder())
    next(rounds)
    place.wire.nodes[101] = {"client": 2, "data": place.wire.nodes[102]["data"]}
    result = next(rounds)
    assert result.skipped == {1: "NotThisClient"}
    assert all(math.isnan(value) for value in result.accuracy["seen"][1])


# ---- who is who


def key_pair() -> tuple[bytes, str]:
    """A node's public key as Flower tells it, and the line of its file."""
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem, public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def test_a_fingerprint_is_what_ssh_keygen_prints() -> None:
    """Of this key it prints: 384 SHA256:rA4t... somebody (ECDSA)."""
    line = (
        "ecdsa-sha2-nistp384 AAAAE2VjZHNhLXNoYTItbmlzdHAzODQAAAAIbmlzdHAzODQAAABhBKSLyaNXP0QCANANZYLFqCHY7J1lJ6m9/GM8D"
        "myiPTTSlMys8MfQRf16tlsiJraEHewN0HdkFXMwevcnmX8ONF0PlxecEyoKQEB8QdF78VB6oHpKIXLgQ3hpQeLwUCLqOg== somebody"
    )
    assert fingerprint(line) == "SHA256:rA4ti2d2kaacJefcPcX7pp8o7U/sMRQOTZYf7ZPNvsU"
    pem, own = key_pair()
    assert key_of(pem) == fingerprint(own)
    assert key_of(b"\x00" * 32) is None  # as a simulation has them
    with pytest.raises(ValueError, match="a public key in OpenSSH's format"):
        fingerprint("nothing")


def test_another_node_cannot_become_a_client_that_was_met(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """Not while the client is away, and not after a new start of the server, unless the operator says so."""
    keys = {node: key_pair() for node in (100, 101, 102, 200)}
    place.wire.keys = {node: pem for node, (pem, _) in keys.items()}
    told = {str(n): fingerprint(keys[100 + n][1]) for n in range(3)}
    with caplog.at_level(logging.WARNING, logger="fedlscl"):
        federation = place.on_flower(timeout=1.0)
        run(federation, stop=1)
        assert "client 1 is from now on at the node with the key SHA256:" in caplog.text
        assert federation.nodes == told
        place.wire.nodes[200] = place.wire.nodes.pop(101)
        for _ in range(2):
            caplog.clear()
            (result,) = run(place.on_flower(timeout=1.0), stop=len(place.on_flower().history) + 1)
            assert set(result.skipped) == {1}
            assert f"node 200 is refused: it says that it is client 1, whose key is {told['1']}" in caplog.text
        new = fingerprint(keys[200][1])
        (result,) = run(place.on_flower(timeout=1.0, clients=f"1={new}"), stop=4)
    assert result.skipped == {}
    assert place.on_flower().nodes == {**told, "1": new}


def test_a_node_that_has_moved_with_its_key_is_the_same_client(place: Place) -> None:
    place.wire.keys = {node: key_pair()[0] for node in (100, 101, 102)}
    run(place.on_flower(), stop=1)
    place.wire.nodes[200], place.wire.keys[200] = place.wire.nodes.pop(101), place.wire.keys.pop(101)
    (result,) = run(place.on_flower(timeout=1.0), stop=2)
    assert result.skipped == {}


def test_keys_in_the_configuration_keep_others_out_from_the_start(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """A rogue node that is there first, and one client's key in the place of another."""
    keys = {node: key_pair() for node in (99, 100, 101, 102)}
    place.wire.nodes[99] = dict(place.wire.nodes[101])
    place.wire.keys = {node: pem for node, (pem, _) in keys.items()}
    named = ",".join(f"{n}={fingerprint(keys[100 + n][1])}" for n in range(3))
    with caplog.at_level(logging.WARNING, logger="fedlscl"):
        (result,) = run(place.on_flower(timeout=1.0, clients=named), stop=1)
    assert result.skipped == {}
    assert "node 99 is refused: it says that it is client 1, whose key is SHA256:" in caplog.text
    assert "from now on" not in caplog.text  # nothing had to be believed
    bindings = Bindings(3, f"0={fingerprint(keys[100][1])}")
    assert "has the key of client 0" in str(bindings.meet(1, fingerprint(keys[100][1])))
    assert Bindings(3, "1=*").meet(1, None) is None


@pytest.mark.parametrize("named", ["3=*", "0=*,0=*", "0", "x=*", "0=SHA256:short"])
def test_keys_that_are_none_are_named(named: str) -> None:
    with pytest.raises(ValueError, match=r"clients (has the entry|names client)"):
        Bindings(3, named)


def test_a_node_that_never_replies_is_dropped_and_taken_up_when_it_replies(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """It costs time-outs in the rounds of the patience, and none after."""
    place.words += ["--federation.rounds", "4"]
    place.wire.words += ["--federation.rounds", "4"]
    silent = {FIT, END}
    place.wire.fault = silence(101, silent, place.wire._answer, place.wire)
    federation, clock = place.on_flower(timeout=10.0, patience=2), server.time
    found, spent = [], []
    with caplog.at_level(logging.WARNING, logger="fedlscl"):
        for result in federation.run(Recorder()):
            found.append(result.skipped.get(1, ""))
            spent.append(clock.now)  # type: ignore[attr-defined]
            if result.round == 5:
                silent.clear()
    assert found[:2] == ["TimeoutError: no reply within 10 s"] * 2
    assert found[2:4] == ["TimeoutError: dropped, no reply in time in 2 rounds in a row"] * 2
    assert found[4] == "TimeoutError: no reply within 10 s"  # asked again, and dropped at once, now for four rounds
    assert found[5:] == ["TimeoutError: dropped, no reply in time in 2 rounds in a row"] * 3
    rounds = [b - a for a, b in zip([0.0, *spent], spent, strict=False)]
    assert all(seconds >= 20 for seconds in rounds[:2])
    assert all(seconds < 5 for seconds in rounds[2:4])
    assert "client 1 is dropped, and asked again in round 5" in caplog.text


def test_a_dropped_client_whose_node_starts_again_takes_part_at_once(place: Place) -> None:
    silent = {FIT, END}
    place.wire.fault = silence(101, silent, place.wire._answer, place.wire)
    rounds = place.on_flower(timeout=1.0, patience=1).run(Recorder())
    assert next(rounds).skipped == {1: "TimeoutError: no reply within 1 s"}
    place.wire.offline = {101}
    assert set(next(rounds).skipped) == {1}
    place.wire.offline = set()
    silent.clear()
    assert next(rounds).skipped == {}


def silence(node: int, kinds: set[str], answer: Any, wire: Wire) -> Fault:
    """Nothing comes of messages of some kinds to a node, which does not see them."""

    def fault(message: Message, reply: Message | None) -> Message | None:
        deaf = message.metadata.dst_node_id == node and message.metadata.message_type in kinds
        return None if deaf else reply

    def hear(message: Message) -> Message:
        deaf = message.metadata.dst_node_id == node and message.metadata.message_type in kinds
        return Message(RecordDict(), reply_to=message) if deaf else answer(message)  # type: ignore[no-any-return]

    wire._answer = hear  # type: ignore[method-assign]
    return fault


# ---- one folder, one engine; one split, one configuration


def test_a_run_does_not_change_its_engine(place: Place) -> None:
    """Neither knows the states that the other has left, and would begin anew in the middle."""
    run(place.in_process(), stop=1)
    run(place.on_flower(), stop=1)
    (place.folder / "server").rename(place.folder / "flower")
    (place.folder / "whole").rename(place.folder / "server")
    with pytest.raises(ValueError, match="holds a run in one process; go on with `fedlscl fit`"):
        place.on_flower()
    (place.folder / "flower").rename(place.folder / "whole")
    with pytest.raises(ValueError, match="holds a run on Flower; go on with `flwr run`"):
        place.in_process()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--seed_everything", "8"], "was dealt with data.seed 7, the run has 8; deal again"),
        (["--data.split.dirichlet_alpha", "3"], r"was dealt with data.split .*alpha=1.0.*the run has .*alpha=3.0"),
    ],
)
def test_a_share_that_was_dealt_for_another_configuration_is_refused(
    place: Place, words: list[str], complaint: str
) -> None:
    place.words += words
    with pytest.raises(ValueError, match=complaint):
        place.on_flower()


def test_a_machine_on_which_the_words_mean_something_else_is_refused(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.wire.words_of[101] = [*place.wire.words, "--model.learning_rate", "0.5"]
    with caplog.at_level(logging.WARNING, logger="fedlscl"):
        (result,) = run(place.on_flower(timeout=1.0), stop=1)
    assert set(result.skipped) == {1}
    assert "node 101 is refused: client 1 has another configuration (" in caplog.text


@pytest.mark.parametrize(
    "counts",
    [{"flops": math.nan}, {"flops": 1.0}, {"trained_parameters": 1, "flops_frozen": 1, "flops": -1}, {"flops": [1]}],
    ids=str,
)
def test_impossible_counts_are_not_taken(
    place: Place, counts: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The next client is asked."""

    def tamper(message: Message, reply: Message | None) -> Message | None:
        if reply is not None and message.metadata.message_type == COST and message.metadata.dst_node_id == 100:
            return Message(RecordDict({"cost": MetricRecord(counts)}), reply_to=message)
        return reply

    place.wire.fault = tamper
    with caplog.at_level(logging.WARNING, logger="fedlscl"):
        assert set(place.on_flower().cost()["resnet18"]) == {"trained_parameters", "flops_frozen", "flops"}
    assert "client 0 does not say what it computes" in caplog.text


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # of Flower's own
def test_the_app_passes_the_checks_of_the_flower_hub(capsys: pytest.CaptureFixture[str]) -> None:
    """Those that `flwr app publish` makes before it sends anything; and the classes that the app names are there."""
    publish = importlib.import_module("flwr.cli.app_cmd.publish")  # a function hides it where it is imported from
    app = Path(__file__).resolve().parents[1] / "experiments" / "flower"
    config, warnings = load_and_validate(app / "pyproject.toml", check_module=False)
    assert warnings == []
    publish._validate_app_name(app.name, "folder")
    publish._validate_description(config["project"]["description"])
    assert len(config["project"]["description"]) <= 200  # above, it asks
    publish._validate_files(publish._collect_file_paths(app))
    assert "2 files" in capsys.readouterr().out
    for kind, made in (("serverapp", server_app), ("clientapp", client_app)):
        module, _, name = config["tool"]["flwr"]["app"]["components"][kind].partition(":")
        assert getattr(importlib.import_module(module), name) is made
