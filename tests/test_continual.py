"""The replay phase: who is replayed how often, and under which loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlscl.batches import Output
from fedlscl.continual import Continual, NoReplay, Replay, Step
from fedlscl.losses import masked_cross_entropy


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


CURRENT = torch.tensor([4, 4, 9, 4, 9, 4])  # four samples of class 4, two of class 9


def test_without_replay_there_is_no_pass() -> None:
    assert NoReplay().passes_over(10, CURRENT, 2, rng()) == []
    with pytest.raises(NotImplementedError, match="NoReplay has no replay phase"):
        NoReplay().replay_losses(step({}))


def test_an_empty_buffer_gives_no_pass() -> None:
    assert Replay().passes_over(0, CURRENT, 2, rng()) == []
    assert Replay(current=False).passes_over(0, CURRENT, 2, rng()) == []
    assert Replay(passes=0).passes_over(5, CURRENT, 2, rng()) == []


def test_the_buffer_alone() -> None:
    passes = Replay(passes=3, current=False).passes_over(5, CURRENT, 2, rng())
    assert [sorted(one.tolist()) for one in passes] == [[0, 1, 2, 3, 4]] * 3


def test_the_buffer_with_as_many_current_samples_of_each_class() -> None:
    passes = Replay(passes=20, current=True).passes_over(5, CURRENT, 3, rng())
    assert len(passes) == 20
    drawn = []
    for one in passes:
        positions = one.tolist()
        assert len(positions) == len(set(positions)) == 5 + 3 + 2
        assert [p for p in positions if p < 5] == [0, 1, 2, 3, 4]
        labels = CURRENT[one[one >= 5] - 5]
        assert int((labels == 4).sum()) == 3
        assert int((labels == 9).sum()) == 2
        drawn.append(tuple(sorted(p - 5 for p in positions if p >= 5)))
    assert len(set(drawn)) == 4  # a fresh draw each time: every way to leave one of the four out
    assert {p for one in drawn for p in one} == set(range(6))


@given(
    st.integers(1, 20), st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(1, 6), st.integers(0, 3),
    st.booleans(), st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_each_pass_holds_every_buffered_sample_once(
    buffered: int, classes: list[int], per_class: int, count: int, current: bool, seed: int
) -> None:
    replay = Replay(passes=count, current=current)
    labels = torch.tensor(classes)
    passes = replay.passes_over(buffered, labels, per_class, rng(seed))
    assert len(passes) == count
    extra = sum(min(per_class, classes.count(label)) for label in set(classes)) if current else 0
    for one in passes:
        positions = one.tolist()
        assert sorted(p for p in positions if p < buffered) == list(range(buffered))
        assert len(set(positions)) == len(positions) == buffered + extra
        assert max(positions) < buffered + len(classes)
    again = replay.passes_over(buffered, labels, per_class, rng(seed))
    assert all(one.equal(other) for one, other in zip(passes, again, strict=True))


# ------------------------------------------------------------------ the loss

LOGITS = torch.tensor([[1.0, 2.0, 99.0], [0.5, -1.0, 99.0]])
LABELS = torch.tensor([1, 0])
SEEN = torch.tensor([True, True, False])
NOW = {"features": torch.tensor([[1.0, 0.0], [0.0, 2.0]]), "weights": torch.tensor([[1.0, 1, 1], [0, 0, 0]])}
BEFORE = {"features": torch.tensor([[0.0, 0.0], [7.0, 7.0]]), "weights": torch.tensor([[0.0, 0, 0], [7, 7, 7]])}
KNOWN = torch.tensor([1.0, 0.0])


def step(snapshot: dict[str, Tensor]) -> Step:
    output = Output(LOGITS, torch.zeros(2, 1), NOW)
    return Step(output, LABELS, SEEN, torch.tensor([True, False, False]), snapshot, KNOWN, {}, {})


def terms(replay: Continual, snapshot: dict[str, Tensor]) -> dict[str, Tensor]:
    return replay.replay_losses(step(snapshot))


def test_a_strategy_does_nothing_that_it_does_not_say() -> None:
    plain = NoReplay()
    assert plain.collaborative_losses(step(BEFORE)) == {}
    assert plain.preserved(Output(LOGITS, torch.zeros(2, 1), NOW)) == {}
    assert plain.consolidate({"w": torch.zeros(1)}, iter([torch.zeros(())]), {}) == {}
    assert (plain.observes, Replay().observes) == ("nothing", "buffer")


def test_replay_preserves_what_the_method_generates() -> None:
    assert Replay().preserved(Output(LOGITS, torch.zeros(2, 1), NOW)) == NOW
    assert Replay().preserved(Output(LOGITS, torch.zeros(2, 1))) == {}


def test_the_terms_are_those_of_eq_4_with_their_weights() -> None:
    got = terms(Replay(lambda_e=3.0, lambda_w=0.5), BEFORE)
    assert set(got) == {"cross_entropy", "features", "weights"}
    torch.testing.assert_close(got["cross_entropy"], masked_cross_entropy(LOGITS, LABELS, SEEN))
    assert float(got["features"]) == 3.0 * 1.0
    assert float(got["weights"]) == 0.5 * 3.0


def test_a_snapshot_holds_what_its_method_generates() -> None:
    assert set(terms(Replay(), {})) == {"cross_entropy"}
    assert set(terms(Replay(), {"features": BEFORE["features"]})) == {"cross_entropy", "features"}


def test_the_weights_do_not_get_mixed_up() -> None:
    got = terms(Replay(lambda_e=0.0, lambda_w=1.0), BEFORE)
    assert float(got["features"]) == 0
    assert float(got["weights"]) == 3
    got = terms(Replay(lambda_e=1.0, lambda_w=0.0), BEFORE)
    assert float(got["features"]) == 1
    assert float(got["weights"]) == 0


@pytest.mark.parametrize("name", ["lambda_e", "lambda_w", "passes"])
def test_a_negative_setting_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"continual\.{name} is -1, must be at least 0"):
        Replay(**{name: -1})
