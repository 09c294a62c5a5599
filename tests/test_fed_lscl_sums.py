"""O2D from sums: the same solutions as on the server, and a lambda that never hurts on the buffer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Recorder, copy_of, make_client, restore_client, run
from torch import Tensor

from fedlscl.federation.algorithm import Federation
from fedlscl.messages import Message, Upload
from fedlscl.methods.fed_lscl import ExactO2D
from fedlscl.methods.fed_lscl_sums import STRENGTHS, FedLSCLSums
from fedlscl.server import Sum

Make = Callable[..., Federation]


def generators(federation: Federation) -> list[dict[str, Tensor]]:
    return [copy_of(restore_client(federation, index).shared()) for index in range(federation.clients)]


def first_round(federation: Federation) -> Any:
    result = next(iter(federation.run(Recorder())))
    return result


@pytest.mark.parametrize("strength", [0.01, 0.5, 50.0])
def test_the_clients_solve_what_the_server_would(make: Make, strength: float) -> None:
    served = make(server=ExactO2D(strength))
    alone = make(client=make_client(FedLSCLSums, strength=strength), server=Sum())
    results = [first_round(federation) for federation in (served, alone)]
    assert results[1].skipped == {}
    for one, two in zip(generators(served), generators(alone), strict=True):
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
    assert results[0].accuracy == results[1].accuracy


def test_second_moments_and_targets_travel(make: Make, wire: list[tuple[Message, bytes]]) -> None:
    federation = make(client=make_client(FedLSCLSums), server=Sum())
    first_round(federation)
    uploads = [message for message, _ in wire if isinstance(message, Upload)]
    assert [set(message.tensors) for message in uploads] == [{"gram", "target"}] * 3
    size = 16 + 1
    for message in uploads:
        gram, target = message.tensors["gram"], message.tensors["target"]
        assert gram.shape == (size, size)
        torch.testing.assert_close(gram, gram.T)
        assert gram.diagonal()[:-1].sum() == pytest.approx(1, abs=1e-5)  # features of unit length
        assert gram[-1, -1] == 1
        assert target.shape == (size, 4 * 2 * 32)


def test_the_chosen_strength_is_the_best_on_the_buffer(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []
    loss = FedLSCLSums._loss

    def spy(self: FedLSCLSums) -> float:
        value = loss(self)
        seen[-1].append(value)
        return value

    solve = FedLSCLSums._solve

    def outer(self: FedLSCLSums, everyone: Any) -> None:
        seen.append([])
        solve(self, everyone)
        chosen = loss(self)
        assert chosen == pytest.approx(min(seen[-1]), abs=1e-6)
        assert len(seen[-1]) == 1 + len(STRENGTHS)
        assert float(self.chosen) == pytest.approx((0, *STRENGTHS)[seen[-1].index(min(seen[-1]))])

    monkeypatch.setattr(FedLSCLSums, "_loss", spy)
    monkeypatch.setattr(FedLSCLSums, "_solve", outer)
    federation = make(client=make_client(FedLSCLSums), server=Sum())
    run(federation)
    assert len(seen) == 3 * 2  # clients and rounds
    assert len({values.index(min(values)) for values in seen}) > 1  # not the same for all, here


def test_a_client_alone_keeps_its_generator(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = make(client=make_client(FedLSCLSums), server=Sum(), clients_per_round=1)
    sent = []
    outgoing = FedLSCLSums.outgoing

    def spy(self: FedLSCLSums) -> dict[str, Tensor]:
        sent.append((self.index, copy_of(self.shared())))
        return outgoing(self)

    monkeypatch.setattr(FedLSCLSums, "outgoing", spy)
    first_round(federation)
    ((index, before),) = sent
    for name, after in generators(federation)[index].items():
        torch.testing.assert_close(after, before[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strength", [0.0, -1.0])
def test_a_strength_that_is_not_positive_is_named(strength: float) -> None:
    with pytest.raises(ValueError, match=rf"model\.strength is {strength}, must be positive or auto"):
        make_client(FedLSCLSums, strength=strength)
