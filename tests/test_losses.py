"""The objectives against numbers worked out by hand, explicit loops, and gradients that must vanish."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlscl.losses import continual_penalty, masked_cross_entropy, o2d_loss


def test_masked_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[math.log(2), math.log(6), 50.0], [0.0, math.log(3), 50.0]])
    classes = torch.tensor([True, True, False])
    labels = torch.tensor([0, 1])
    each = masked_cross_entropy(logits, labels, classes, reduction="none")
    torch.testing.assert_close(each, torch.tensor([math.log(4), math.log(4 / 3)]))
    mean = masked_cross_entropy(logits, labels, classes)
    assert mean.ndim == 0
    assert float(mean) == pytest.approx((math.log(4) + math.log(4 / 3)) / 2)
    total = masked_cross_entropy(logits, labels, classes, reduction="sum")
    assert float(total) == pytest.approx(math.log(4) + math.log(4 / 3))


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_it_is_the_cross_entropy_of_the_logits_cut_to_the_classes(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 7))
    kept = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1)))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    logits = (torch.randn(5, size, generator=rng) * 10).requires_grad_()
    cut_labels = torch.randint(len(kept), (5,), generator=rng)
    classes = torch.zeros(size, dtype=torch.bool)
    classes[kept] = True

    loss = masked_cross_entropy(logits, torch.tensor(kept)[cut_labels], classes)
    expected = F.cross_entropy(logits[:, kept], cut_labels)
    torch.testing.assert_close(loss, expected)
    (got,) = torch.autograd.grad(loss, logits)
    (wanted,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(got, wanted)
    assert torch.count_nonzero(got[:, ~classes]) == 0


def test_a_class_outside_the_mask_gets_no_gradient_and_moves_nothing() -> None:
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    classes = torch.tensor([True, False, True, False, True, False])
    labels = torch.tensor([0, 2, 4, 0])
    loss = masked_cross_entropy(logits, labels, classes)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.equal(gradient[:, ~classes], torch.zeros(4, 3))
    assert bool((gradient[:, classes] != 0).all())
    assert torch.isfinite(gradient).all()
    moved = logits.detach().clone()
    moved[:, ~classes] = 1e30
    assert torch.equal(masked_cross_entropy(moved, labels, classes), loss)


def test_logits_of_any_size_are_masked() -> None:
    logits = torch.tensor([[-(2.0**20), 1 - 2.0**20, 0.0]])  # the two that compete are far below the one that does not
    loss = masked_cross_entropy(logits, torch.tensor([0]), torch.tensor([True, True, False]))
    assert float(loss) == pytest.approx(math.log(1 + math.e))


def test_one_class_alone_costs_nothing() -> None:
    loss = masked_cross_entropy(torch.tensor([[3.0, 9.0]]), torch.tensor([0]), torch.tensor([True, False]))
    assert loss == 0


def test_half_precision_logits_are_summed_in_single_precision() -> None:
    logits = torch.randn(8, 20, generator=torch.Generator().manual_seed(1)).bfloat16()
    labels, classes = torch.arange(8), torch.ones(20, dtype=torch.bool)
    loss = masked_cross_entropy(logits, labels, classes)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), labels))


# ----------------------------------------------------------- continual penalty

NOW = torch.tensor([[1.0, 2.0], [0.0, 0.0], [5.0, -1.0]])
BEFORE = torch.tensor([[0.0, 0.0], [3.0, 4.0], [5.0, 1.0]])


def test_the_penalty_is_the_mean_squared_distance_of_the_known_samples() -> None:
    assert float(continual_penalty(NOW, BEFORE, torch.ones(3))) == pytest.approx((5 + 25 + 4) / 3)
    assert float(continual_penalty(NOW, BEFORE, torch.tensor([1.0, 0.0, 1.0]))) == pytest.approx((5 + 4) / 2)
    assert float(continual_penalty(NOW, BEFORE, torch.tensor([0.0, 1.0, 0.0]))) == 25
    assert float(continual_penalty(BEFORE, BEFORE, torch.ones(3))) == 0


def test_samples_that_are_not_known_have_no_part_in_the_penalty() -> None:
    now = NOW.clone().requires_grad_()
    known = torch.tensor([1.0, 0.0, 1.0])
    (gradient,) = torch.autograd.grad(continual_penalty(now, BEFORE, known), now)
    torch.testing.assert_close(gradient, (NOW - BEFORE) * known[:, None])  # 2 (now - before) / 2 samples
    arbitrary = BEFORE.clone()
    arbitrary[1] = 1e6
    torch.testing.assert_close(continual_penalty(NOW, arbitrary, known), continual_penalty(NOW, BEFORE, known))


def test_with_no_known_sample_the_penalty_is_zero_and_so_is_its_gradient() -> None:
    now = NOW.clone().requires_grad_()
    penalty = continual_penalty(now, BEFORE, torch.zeros(3))
    (gradient,) = torch.autograd.grad(penalty, now)
    assert penalty == 0
    assert torch.equal(gradient, torch.zeros(3, 2))


# --------------------------------------------------------------- O2D objective


def test_the_o2d_loss_by_hand() -> None:
    weight, bias = torch.tensor([[1.0]]), torch.tensor([0.0])
    own = (torch.tensor([[3.0]]), torch.tensor([1.0]))
    features, wanted = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [5.0]])  # of a teacher 2 x + 1
    # the outputs differ by -2 and -3, so the mean square is 6.5; the entries by -2 and -1, so the sum of squares is 5
    assert float(o2d_loss(weight, bias, own, features, wanted, 0.1)) == pytest.approx(6.5 + 0.1 * 5)
    assert float(o2d_loss(weight, bias, own, features[:1], wanted[:1], 0.0)) == pytest.approx(4)


def test_the_teachers_losses_are_the_loop_that_eq_5_writes_down() -> None:
    rng = torch.Generator().manual_seed(3)
    size, e = 4, 3

    def linear() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(size, e, generator=rng).double(), torch.randn(size, generator=rng).double()

    (weight, bias), own, teachers = linear(), linear(), [linear() for _ in range(3)]
    features = [torch.randn(n, e, generator=rng).double() for n in (1, 4, 7)]
    expected = 0.0
    for (teacher_weight, teacher_bias), rows in zip(teachers, features, strict=True):
        distances = []
        for x in rows:
            student_output = [float(weight[p] @ x + bias[p]) for p in range(size)]
            teacher_output = [float(teacher_weight[p] @ x + teacher_bias[p]) for p in range(size)]
            distances.append(sum((s - t) ** 2 for s, t in zip(student_output, teacher_output, strict=True)))
        expected += sum(distances) / len(distances)
    for p in range(size):
        expected += 0.3 * float(bias[p] - own[1][p]) ** 2
        expected += 0.3 * sum(float(weight[p, q] - own[0][p, q]) ** 2 for q in range(e))
    found = 0.0
    for (teacher_weight, teacher_bias), x in zip(teachers, features, strict=True):
        found += float(o2d_loss(weight, bias, own, x, x @ teacher_weight.T + teacher_bias, 0.3 / 3))
    assert found == pytest.approx(expected, rel=1e-12)
