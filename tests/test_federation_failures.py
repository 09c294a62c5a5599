"""Clients that fail, diverge or send what cannot be used: left out by name, and nobody else notices."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from helpers import (
    Recorder,
    contents,
    copy_of,
    make_client,
    restore_client,
    run,
    same,
)
from torch import Tensor

from fedlscl.evaluation import MASKS
from fedlscl.federation.algorithm import Federation, NobodyLeft
from fedlscl.federation.callback import RoundResult
from fedlscl.federation.transport import is_the_machines
from fedlscl.federation.worker import Worker
from fedlscl.files import Damaged
from fedlscl.messages import Message, Upload
from fedlscl.methods.fed_lscl import ExactO2D, FedLSCL
from fedlscl.schedule import Schedule
from fedlscl.server import Answer, Answers, Context, Metrics, OnDemand, Server

Make = Callable[..., Federation]


def break_upload(monkeypatch: pytest.MonkeyPatch, client: int, change: Callable[[Upload], Upload | bytes]) -> None:
    """Let one client send something else than what it should."""
    serialise = Upload.to_bytes

    def broken(self: Upload) -> bytes:
        sent = change(self) if self.client == client else self
        return sent if isinstance(sent, bytes) else serialise(sent)

    monkeypatch.setattr(Upload, "to_bytes", broken)


def with_tensors(upload: Upload, **tensors: Tensor) -> Upload:
    return Upload(upload.client, upload.task, upload.round, upload.samples, {**upload.tensors, **tensors})


class Fragile(FedLSCL):
    """Fails in the fit of given (client, round) pairs, after it has begun to train."""

    failures: frozenset[tuple[int, int]] = frozenset()
    error: Exception = ValueError("one image is too few")

    def on_train_end(self) -> None:
        super().on_train_end()
        if (self.index, self.round.number) in self.failures:
            raise self.error


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, logger="fedlscl")
    return caplog


def test_a_failing_client_is_left_out_and_comes_back(
    make: Make, monkeypatch: pytest.MonkeyPatch, quiet: pytest.LogCaptureFixture
) -> None:
    federation = make(client=make_client(Fragile), rounds=3)
    monkeypatch.setattr(Fragile, "failures", {(1, 2)})
    before: dict[int, dict[str, Tensor] | None] = {}
    results = []
    recorder = Recorder()
    for result in federation.run(recorder):
        results.append(result)
        stored = federation.store.read("client-1")
        before[result.round] = stored and copy_of(stored)
    assert results[1].skipped == {1: "ValueError: one image is too few"}
    assert sorted(results[1].bytes_up) == sorted(results[1].bytes_down) == [0, 2]
    assert before[1] is not None
    assert before[2] is not None
    assert before[3] is not None
    assert same(before[1], before[2])
    assert not same(before[2], before[3])
    for result in results[:1] + results[2:]:
        assert result.skipped == {}
        assert sorted(result.bytes_up) == [0, 1, 2]
    assert recorder.turns == 18
    assert "client 1 is left out of round 2" in quiet.text


def test_the_others_do_not_notice_who_failed(
    make: Make, monkeypatch: pytest.MonkeyPatch, wire: list[tuple[Message, bytes]]
) -> None:
    """What a failing client leaves in the shared body must not reach the next one."""
    monkeypatch.setattr(Fragile, "failures", {(0, 1), (1, 3)})
    run(make(client=make_client(Fragile), rounds=2))
    with_failures = contents(wire)
    wire.clear()
    participants = Schedule.participants
    absent = {1: 0, 3: 1}
    monkeypatch.setattr(Fragile, "failures", frozenset())
    monkeypatch.setattr(
        Schedule,
        "participants",
        lambda self, clients, round: [i for i in participants(self, clients, round) if absent.get(round.number) != i],
    )
    run(make(client=make_client(Fragile), rounds=2))
    assert contents(wire) == with_failures


def test_a_failure_in_the_first_round_leaves_the_common_start(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fragile, "failures", frozenset({(1, 1)}))
    federation = make(client=make_client(Fragile))
    start = copy_of(restore_client(federation, 1).state())
    result = next(federation.run(Recorder()))
    assert list(result.skipped) == [1]
    assert same(restore_client(federation, 1).state(), start)
    assert len(result.accuracy["task"]) == 3


def test_without_anyone_the_run_stops(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fragile, "failures", {(index, 1) for index in range(3)})
    with pytest.raises(
        RuntimeError, match=r"no client finished round 1: client 0, 1, 2: ValueError: one image is too few"
    ):
        next(make(client=make_client(Fragile)).run(Recorder()))


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        KeyError("a bug"),
        TypeError("a bug"),
        RuntimeError("a bug"),
    ],
    ids=lambda error: f"{type(error).__name__} {error}",
)
def test_no_client_is_blamed_for_the_machine_or_for_a_bug(
    make: Make, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Nor does the round go on without it, which would be another run; what was done before is kept."""
    federation = make(client=make_client(Fragile), rounds=2)
    monkeypatch.setattr(Fragile, "failures", {(1, 2)})
    monkeypatch.setattr(Fragile, "error", error)
    rounds = federation.run(Recorder())
    assert next(rounds).skipped == {}
    with pytest.raises(type(error)) as raised:
        next(rounds)
    assert raised.value is error
    assert error.__notes__ == ["This happened to client 1 in round 2."]
    assert federation.store.progress["round"] == 1


def test_a_cause_on_the_machine_is_found_behind_what_follows_from_it() -> None:
    def raised(error: Exception, cause: Exception | None, context: Exception | None = None) -> Exception:
        error.__context__ = context
        if cause is not None:
            error.__cause__ = cause
        return error

    assert is_the_machines(raised(ValueError(), OSError()))
    assert is_the_machines(raised(ValueError(), raised(KeyError(), None, MemoryError())))
    assert is_the_machines(Damaged("client-0 is damaged"))
    assert not is_the_machines(raised(ValueError(), KeyError(), OSError()))  # another cause is named
    assert not is_the_machines(FloatingPointError())


def test_training_that_diverges_is_one_line_that_names_the_field(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="fedlscl")
    with pytest.raises(NobodyLeft, match=r"no client finished round 1: client 0.*training diverged: '"):
        next(make(client=make_client(learning_rate=1e30)).run(Recorder()))
    for level, traceback in ((logging.WARNING, False), (logging.DEBUG, True)):
        records = [record for record in caplog.records if record.levelno == level and record.name.startswith("fedlscl")]
        assert len(records) == 3
        assert [record.exc_info is not None for record in records] == [traceback] * 3
        if not traceback:
            assert records[0].message.endswith("model.learning_rate is 1e+30, take a smaller one")


def test_a_client_that_lost_its_state_does_not_start_from_nothing(make: Make) -> None:
    federation = make(rounds=2)
    rounds = federation.run(Recorder())
    next(rounds)
    federation.store.forget("client-1")
    with pytest.raises(Damaged, match="lacks the state of client 1, which had a part in earlier rounds"):
        next(rounds)


MALFORMED: dict[str, tuple[Callable[[Upload], Upload | bytes], str]] = {
    "a tensor is missing": (
        lambda u: Upload(u.client, u.task, u.round, u.samples, {"weight": u.tensors["weight"]}),
        r"lacks tensors \['bias', 'features'\]",
    ),
    "an unknown tensor": (lambda u: with_tensors(u, labels=torch.zeros(3)), r"unknown tensors \['labels'\]"),
    "not a number": (lambda u: with_tensors(u, bias=torch.full_like(u.tensors["bias"], torch.nan)), "'bias'.*NaN"),
    "infinite": (
        lambda u: with_tensors(u, features=torch.full_like(u.tensors["features"], -torch.inf)),
        "'features'.*infinite",
    ),
    "wrong shape": (lambda u: with_tensors(u, weight=u.tensors["weight"].T), r"'weight' has shape \(16, 256\)"),
    "wrong dtype": (lambda u: with_tensors(u, bias=u.tensors["bias"].double()), "'bias' has dtype"),
    "no features": (lambda u: with_tensors(u, features=torch.zeros(0, 16)), "'features' has shape"),
    "too many features": (
        lambda u: with_tensors(u, features=torch.zeros(25, 16)),
        "'features' has shape|bytes, at most",
    ),
    "cut off": (lambda u: Message.to_bytes(u)[:-5], "damaged"),
    "empty": (lambda u: b"", "truncated"),
    "noise": (lambda u: bytes(range(256)) * 8, "truncated|header"),
    "of another client": (
        lambda u: Upload(0, u.task, u.round, u.samples, u.tensors),
        "claims to be of client 0, round 1",
    ),
    "of another round": (
        lambda u: Upload(u.client, u.task, 7, u.samples, u.tensors),
        "claims to be of client 1, round 7",
    ),
    "of another task": (
        lambda u: Upload(u.client, 2, u.round, u.samples, u.tensors),
        "claims to be of client 1, round 1, task 2",
    ),
    "with more samples than it has": (
        lambda u: Upload(u.client, u.task, u.round, 10**17, u.tensors),
        "claims 100000000000000000 samples, and the split gives this client",
    ),
    "with features that are not of unit length": (
        lambda u: with_tensors(u, features=1000 * u.tensors["features"]),
        "'features' has a row of length 1000, must be 1",
    ),
    "without samples": (
        lambda u: Upload(u.client, u.task, u.round, 0, u.tensors),
        "claims that no sample is behind it",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_upload_is_refused_by_name(make: Make, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    change, reason = MALFORMED[case]
    seen: list[set[int]] = []
    aggregate = ExactO2D.aggregate

    def spy(self: ExactO2D, uploads: dict[int, Upload], *rest: Any) -> Any:
        seen.append(set(uploads))
        return aggregate(self, uploads, *rest)

    monkeypatch.setattr(ExactO2D, "aggregate", spy)
    break_upload(monkeypatch, 1, change)
    nothing = {mask: [0.0] for mask in MASKS}
    monkeypatch.setattr(Worker, "evaluate", lambda *a: nothing)  # the accuracy is not asked for here
    federation = make()
    start = copy_of(restore_client(federation, 1).state())
    result: RoundResult = next(federation.run(Recorder()))
    assert list(result.skipped) == [1]
    assert result.skipped[1].startswith("MessageError: upload")
    assert re.search(reason, result.skipped[1])
    assert same(restore_client(federation, 1).state(), start)  # as after any other failure
    assert seen == [{0, 2}]
    assert sorted(result.bytes_down) == [0, 2]


def test_a_client_that_diverged_once_can_come_back(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that are not finite must not become the client's last good state."""
    federation = make(rounds=2)
    on_train_end = FedLSCL.on_train_end

    def diverge(self: FedLSCL) -> None:
        on_train_end(self)
        if (self.index, self.round.number) == (1, 1):
            with torch.no_grad():
                self.generator.bias.fill_(torch.nan)
                self.head.bias.fill_(torch.nan)

    monkeypatch.setattr(FedLSCL, "on_train_end", diverge)
    rounds = federation.run(Recorder())
    first = next(rounds)
    assert list(first.skipped) == [1]
    second = next(rounds)
    assert second.skipped == {}


HUGE: dict[str, Callable[[Upload], Upload]] = {
    "all 1e15": lambda u: with_tensors(u, **{n: torch.full_like(u.tensors[n], 1e15) for n in ("weight", "bias")}),
    "a generator x 1e6": lambda u: with_tensors(u, weight=1e6 * u.tensors["weight"]),
    "one number": lambda u: with_tensors(u, bias=u.tensors["bias"].index_fill(0, torch.tensor(0), 1e15)),
}


@pytest.mark.parametrize("case", HUGE)
def test_who_sends_far_more_than_the_others_is_left_out_and_nobody_else_notices(
    make: Make, monkeypatch: pytest.MonkeyPatch, case: str, quiet: pytest.LogCaptureFixture
) -> None:
    break_upload(monkeypatch, 1, HUGE[case])
    first, second = run(make())
    assert set(first.skipped) == set(second.skipped) == {1}
    assert re.search(r"the root mean square of '(weight|bias)' is .*, more than 100 times the", first.skipped[1])
    assert sorted(first.bytes_down) == sorted(second.bytes_down) == [0, 2]
    assert first.unanswered == {}
    assert "client 1 is left out of round 1" in quiet.text


def test_the_number_of_samples_is_that_of_all_tasks_since_the_last(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that failed in the first task trains on both in the second, and says so."""
    monkeypatch.setattr(Fragile, "failures", frozenset({(1, 1)}))
    results = run(make(client=make_client(Fragile)))
    assert [set(result.skipped) for result in results] == [{1}, set()]


class Answering(Server):
    """Answers every client with what a test wants."""

    answer: Callable[[int, int], float] = staticmethod(lambda round, client: 0.0)
    eager = True

    def __init__(self) -> None:
        super().__init__()
        self.rounds = torch.zeros(())

    def state(self) -> dict[str, Tensor]:
        return {"rounds": self.rounds}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.rounds = state["rounds"]

    def aggregate(self, uploads: Mapping[int, Upload], context: Context) -> tuple[Answers, Metrics]:
        self.rounds = self.rounds + 1

        def answer(client: int) -> Answer:
            sent = uploads[client].tensors
            value = self.answer(context.round.number, client)
            return Answer({"weight": sent["weight"] + value, "bias": sent["bias"]}, {"value": value})

        if self.eager:
            return {client: answer(client) for client in uploads}, {}
        return OnDemand(uploads, answer), {}


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e20])
def test_clients_keep_their_models_where_no_answer_can_be_used(
    make: Make, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """The server is as it was before, and the round and its reason are on record."""
    monkeypatch.setattr(Answering, "answer", staticmethod(lambda round, client: value if round == 1 else 0.0))
    federation = make(server=Answering())
    first, second = run(federation)
    assert set(first.unanswered) == {0, 1, 2}
    assert first.unanswered[0].startswith("the server's answer: tensor 'weight' holds NaN or infinite values")
    assert first.skipped == second.skipped == second.unanswered == first.bytes_down == first.server == {}
    assert sorted(second.bytes_down) == [0, 1, 2]
    state = federation.store.read("server")
    assert state is not None
    assert state["rounds"] == 1  # the first round has left no trace
    assert RoundResult.from_json(json.loads(json.dumps(first.to_json()))).unanswered == first.unanswered


def test_of_answers_on_demand_one_that_cannot_be_used_concerns_its_client_alone(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answering, "eager", False)
    monkeypatch.setattr(Answering, "answer", staticmethod(lambda round, client: torch.inf if client == 2 else 1.0))
    first, _ = run(make(server=Answering()))
    assert set(first.unanswered) == {2}
    assert sorted(first.bytes_down) == [0, 1]
    assert first.server == {"value": 1.0}


def test_a_server_that_cannot_compute_with_the_numbers_answers_nobody(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(round: int, client: int) -> float:
        if round == 1:
            raise torch.linalg.LinAlgError("it did not converge")  # type: ignore[attr-defined]
        return 0.0

    monkeypatch.setattr(Answering, "answer", staticmethod(fail))
    first, second = run(make(server=Answering()))
    assert first.unanswered == dict.fromkeys(range(3), "it did not converge")
    assert second.unanswered == {}


def test_a_fault_in_a_server_is_no_client_s_and_ends_the_run(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(round: int, client: int) -> float:
        raise OSError("no space left on device")

    monkeypatch.setattr(Answering, "answer", staticmethod(fail))
    with pytest.raises(OSError, match="no space left"):
        run(make(server=Answering()))


def test_what_a_client_writes_is_a_short_line_in_the_log(
    make: Make, monkeypatch: pytest.MonkeyPatch, quiet: pytest.LogCaptureFixture
) -> None:
    """Half a megabyte of names, with line ends and control characters in them."""
    names = {f"\x1b[2J\n{n}{'x' * 2000}": torch.zeros(1) for n in range(300)}
    break_upload(monkeypatch, 1, lambda u: with_tensors(u, **names))
    result = next(make().run(Recorder()))
    assert set(result.skipped) == {1}
    assert len(result.skipped[1]) <= 500
    assert result.skipped[1].isprintable()
    assert all(len(record.getMessage()) < 600 for record in quiet.records)


def test_features_go_up_in_an_order_that_tells_nothing(make: Make, wire: list[tuple[Message, bytes]]) -> None:
    """Ascending: it depends on nothing but the set, so that nobody can put them back into the buffer's."""
    run(make())
    for message, _ in wire:
        if isinstance(message, Upload):
            rows = message.tensors["features"].tolist()
            assert rows == sorted(rows)
