"""Jobs side by side, of which one runs at a time, and clients that train so."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Recorder, copy_of, make_client, make_federation, outcome, restore_client, run, same
from lightning.pytorch.loggers import Logger
from tape import recording
from torch import Tensor

from fedlscl.data.module import FederatedDataModule
from fedlscl.federation import turns
from fedlscl.federation.callback import FederationCallback
from fedlscl.methods.fed_lscl import FedLSCL
from fedlscl.models.vit import FrozenViT


def steps(name: str, heard: list[str], count: int) -> Callable[[], str]:
    def job() -> str:
        for number in range(count):
            with turns.passed():
                heard.append(f"{name}{number}")
        return name

    return job


def test_one_after_another_until_each_is_done() -> None:
    heard: list[str] = []
    jobs = [steps("a", heard, 2), steps("b", heard, 1), steps("c", heard, 3)]
    assert turns.side_by_side(jobs) == ["a", "b", "c"]
    assert heard == ["a0", "b0", "c0", "a1", "c1", "c2"]
    assert turns.side_by_side([steps("d", heard, 2)]) == ["d"]


def test_nothing_happens_where_nobody_else_waits() -> None:
    with turns.passed():
        pass


def test_each_draws_its_own_numbers() -> None:
    def job(seed: int) -> list[float]:
        torch.manual_seed(seed)
        drawn = []
        for _ in range(3):
            drawn.append(float(torch.rand(1)))
            with turns.passed():
                pass
        return drawn

    before = torch.get_rng_state()
    alone = [job(seed) for seed in range(3)]
    torch.set_rng_state(before)
    assert turns.side_by_side([lambda seed=seed: job(seed) for seed in range(3)]) == alone  # type: ignore[misc]
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_of_torch_are_those_of_the_caller() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert turns.side_by_side([torch.get_num_threads] * 2) == [3, 3]
    finally:
        torch.set_num_threads(before)


def test_one_that_fails_ends_all() -> None:
    heard: list[str] = []
    cleaned: list[str] = []

    def failing() -> str:
        with turns.passed():
            pass
        raise ValueError("mine")

    def endless() -> str:
        try:
            while True:
                with turns.passed():
                    heard.append("on")
        finally:
            cleaned.append("up")

    with pytest.raises(ValueError, match="mine"):
        turns.side_by_side([endless, failing, endless, steps("a", heard, 1)])
    assert cleaned == ["up", "up"]


def test_an_interrupt_ends_all() -> None:
    cleaned: list[str] = []
    main = threading.main_thread().ident
    assert main is not None

    def endless() -> None:
        try:
            while True:
                with turns.passed():
                    signal.pthread_kill(main, signal.SIGINT)
        finally:
            cleaned.append("up")

    with pytest.raises(KeyboardInterrupt):
        turns.side_by_side([endless, endless])
    assert "up" in cleaned  # of the second where it had begun


# ------------------------------------------------------------------ clients


class Heard(Recorder):
    """Writes down what the fits of clients log."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int, dict[str, float]]] = []

    def on_fit_start(self, task: int, round: int, client: int) -> Logger | None:
        super().on_fit_start(task, round, client)
        logged = self.logged

        class Mine(Logger):
            name, version = "mine", 0

            def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
                logged.append((client, metrics))

            def log_hyperparams(self, *_: Any, **__: Any) -> None:
                """There are none."""

        return Mine()


@pytest.fixture
def whole(
    tmp_path: Path, data: FederatedDataModule, vit: FrozenViT, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[list[Any], list[dict[str, Tensor]], Heard]]:
    """Runs two tasks with so many clients at a time: what came out, the states, what was heard."""
    monkeypatch.setattr(turns, "pays", lambda: True)

    def go(together: int, callback: FederationCallback | None = None, **settings: Any) -> Any:
        federation = make_federation(tmp_path / str(together), data, vit, make_client(epochs=3, **settings))
        federation.template.side_by_side = together
        heard = Heard()
        with recording() as tape:
            results = run(federation, heard)
        assert tape.replays
        return outcome(results), [copy_of(restore_client(federation, index).state()) for index in range(3)], heard

    return go


def test_clients_side_by_side_are_what_they_are_alone(whole: Callable[..., Any]) -> None:
    wanted, states, alone = whole(1)
    for together in (2, 3):
        found, others, heard = whole(together)
        assert found == wanted
        assert all(same(one, other) for one, other in zip(states, others, strict=True))
        assert heard.visits == alone.visits
        assert heard.turns == alone.turns
        assert heard.logged == alone.logged


def test_one_client_that_diverges_does_not_stop_the_others(
    whole: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ending = FedLSCL.on_train_end

    def diverging(self: FedLSCL) -> None:
        ending(self)
        if self.index == 1 and self.round.number == 2:
            with torch.no_grad():
                self.head.weight.fill_(torch.nan)

    monkeypatch.setattr(FedLSCL, "on_train_end", diverging)
    results, *_ = whole(3)
    assert [list(result[4]) for result in results] == [[], [1]]


def test_what_is_no_fault_of_a_client_ends_the_run(whole: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: FedLSCL) -> None:
        if self.index == 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(FedLSCL, "on_train_end", broken)
    with pytest.raises(OSError, match="No space left"):
        whole(3)
