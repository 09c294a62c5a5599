"""One-by-one distillation in closed form: against stacked least squares, the gradient of Eq. 5, and its limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from fedlscl.federation.trainer import RoundTrainer
from fedlscl.messages import Upload
from fedlscl.methods.fed_lscl import ExactO2D, IterativeO2D
from fedlscl.methods.o2d import Generator, Student, Sums, matrix, ridge, second_moments, total
from fedlscl.schedule import Round
from fedlscl.server import Context

FEATURES, OUTPUTS = 6, 5
Federation = dict[int, Generator]


def federation(
    clients: int = 3, count: int = 20, features: int = FEATURES, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Federation:
    """Clients with generators and unit-length features of their own, and different numbers of features."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    return {
        index: Generator(
            normal(OUTPUTS, features), normal(OUTPUTS), F.normalize(normal(count + index, features) + 0.2, dim=1)
        )
        for index in range(clients)
    }


def student_of(client: Generator, sums: Sums, strength: float) -> Student:
    return Student(client.weight, client.bias, second_moments(client.features), sums, strength)


def exact(clients: Federation, strength: float) -> dict[int, tuple[Tensor, Tensor]]:
    """The solutions of all clients."""
    sums = total(clients.values())
    return {index: student_of(client, sums, strength).exact() for index, client in clients.items()}


def o2d_objective(
    weight: Tensor,
    bias: Tensor,
    own: tuple[Tensor, Tensor],
    teachers: list[tuple[Tensor, Tensor]],
    features: list[Tensor],
    strength: float,
) -> Tensor:
    """Eq. 5 as it is written."""
    total = strength * ((weight - own[0]).square().sum() + (bias - own[1]).square().sum())
    for (teacher_weight, teacher_bias), x in zip(teachers, features, strict=True):
        difference = torch.nn.functional.linear(x, weight - teacher_weight, bias - teacher_bias)
        total = total + difference.square().sum(dim=1).mean()
    return total


def objective(clients: Federation, student: int, solution: tuple[Tensor, Tensor], strength: float) -> float:
    """Eq. 5 in double precision."""
    own = clients[student]
    teachers = [client for index, client in clients.items() if index != student]
    return float(
        o2d_objective(
            solution[0].double(),
            solution[1].double(),
            (own.weight.double(), own.bias.double()),
            [(teacher.weight.double(), teacher.bias.double()) for teacher in teachers],
            [teacher.features.double() for teacher in teachers],
            strength,
        )
    )


def stacked_least_squares(clients: Federation, student: int, strength: float) -> tuple[NDArray, NDArray]:
    """Eq. 5 as one tall least-squares problem: a row for each feature, weighted, and one for each number of phi."""

    def phi(client: Generator) -> NDArray:
        return np.vstack([client.weight.double().numpy().T, client.bias.double().numpy()])

    own = phi(clients[student])
    rows, targets = [np.sqrt(strength) * np.eye(len(own))], [np.zeros_like(own)]
    for index, client in clients.items():
        if index != student:
            x = np.column_stack([client.features.double().numpy(), np.ones(len(client.features))])
            rows.append(x / np.sqrt(len(x)))
            targets.append(x @ (phi(client) - own) / np.sqrt(len(x)))
    step, *_ = np.linalg.lstsq(np.vstack(rows), np.vstack(targets), rcond=1e-10)  # of least norm
    return (own + step)[:-1].T, (own + step)[-1]


def assert_optimal(clients: Federation, strength: float, tolerance: float = 1e-9) -> None:
    solved = exact(clients, strength)
    assert set(solved) == set(clients)
    for index, (weight, bias) in solved.items():
        wanted_weight, wanted_bias = stacked_least_squares(clients, index, strength)
        np.testing.assert_allclose(weight.double().numpy(), wanted_weight, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(bias.double().numpy(), wanted_bias, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------- the optimum


@pytest.mark.parametrize("strength", [1e-6, 0.01, 0.1, 1.0, 50.0])
def test_the_solution_is_that_of_stacked_least_squares(strength: float) -> None:
    assert_optimal(federation(clients=4), strength)


@given(st.integers(2, 5), st.integers(1, 12), st.integers(1, 9), st.floats(1e-3, 10.0), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_so_it_is_for_any_federation(clients: int, count: int, features: int, strength: float, seed: int) -> None:
    assert_optimal(federation(clients, count, features, seed=seed), strength, tolerance=1e-7)


@pytest.mark.parametrize("strength", [0.0, 1e-3, 0.5])
def test_the_gradient_of_eq_5_vanishes(strength: float) -> None:
    clients = federation()
    for index, solution in exact(clients, strength).items():
        weight, bias = (tensor.requires_grad_() for tensor in solution)
        own = clients[index]
        teachers = [client for other, client in clients.items() if other != index]
        loss = o2d_objective(
            weight,
            bias,
            (own.weight, own.bias),
            [(teacher.weight, teacher.bias) for teacher in teachers],
            [teacher.features for teacher in teachers],
            strength,
        )
        for gradient in torch.autograd.grad(loss, (weight, bias)):
            assert gradient.abs().max() < 1e-10
        assert loss > 0


def test_nothing_nearby_is_better() -> None:
    clients = federation()
    rng = torch.Generator().manual_seed(1)
    for strength in (0.0, 0.1):
        for index, (weight, bias) in exact(clients, strength).items():
            best = objective(clients, index, (weight, bias), strength)
            for size in (1e-4, 1e-2, 1.0):
                for _ in range(20):
                    other = (
                        weight + size * torch.randn(weight.shape, generator=rng),
                        bias + size * torch.randn(bias.shape, generator=rng),
                    )
                    assert objective(clients, index, other, strength) > best


def test_gradient_descent_with_the_trainer_never_gets_below_it_and_comes_close() -> None:
    clients = federation(dtype=torch.float32)
    uploads = {
        index: Upload(index, 1, 1, 10, {"weight": c.weight, "bias": c.bias, "features": c.features})
        for index, c in clients.items()
    }

    def trainer() -> RoundTrainer:
        return RoundTrainer(accelerator="cpu")

    strength = 0.1
    iterative = IterativeO2D(strength, epochs=10, learning_rate=0.02, batch_size=8)
    closed = ExactO2D(strength)
    now = Round(1, 1, True, 7)
    answers = {server: dict(server.aggregate(uploads, Context(3, now, trainer))[0]) for server in (iterative, closed)}
    for index in clients:
        start, descended, solved = (
            objective(clients, index, solution, strength)
            for solution in (
                (clients[index].weight, clients[index].bias),
                (answers[iterative][index].tensors["weight"], answers[iterative][index].tensors["bias"]),
                (answers[closed][index].tensors["weight"], answers[closed][index].tensors["bias"]),
            )
        )
        assert solved < descended < start
        assert descended - solved < 0.5 * (start - solved)
        exact, descent = (answers[server][index].metrics for server in (closed, iterative))
        assert exact["objective_before"] == pytest.approx(descent["objective_before"])
        assert exact["objective_after"] < descent["objective_after"]
        assert exact["objective_after"] == pytest.approx(solved, rel=1e-5)

    server = IterativeO2D(strength, epochs=10, learning_rate=0.02, batch_size=8)
    again = dict(server.aggregate(uploads, Context(3, now, trainer))[0])
    assert all(torch.equal(again[k].tensors["weight"], answers[iterative][k].tensors["weight"]) for k in clients)
    for index, upload in uploads.items():  # what the clients sent is as it was
        assert torch.equal(upload.tensors["weight"], clients[index].weight)


# --------------------------------------------------------------------- limits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_infinite_strength_returns_everyones_own(dtype: torch.dtype) -> None:
    clients = federation(dtype=dtype)
    for index, (weight, bias) in exact(clients, 1e12).items():
        torch.testing.assert_close(weight, clients[index].weight, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(bias, clients[index].bias, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("count", [3, 30])
def test_without_strength_two_clients_learn_each_others_outputs(count: int) -> None:
    clients = federation(clients=2, count=count)
    for strength in (0.0, 1e-9):
        solved = exact(clients, strength)
        for student, teacher in ((0, 1), (1, 0)):
            x = clients[teacher].features
            learned = F.linear(x, *solved[student])
            torch.testing.assert_close(
                learned, F.linear(x, clients[teacher].weight, clients[teacher].bias), rtol=1e-5, atol=1e-5
            )
    if count == 30:  # as many features as determine the generator
        torch.testing.assert_close(solved[0][0], clients[1].weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strength", [0.0, 1e-9, 0.1, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_client_alone_gets_its_own_back(strength: float, dtype: torch.dtype) -> None:
    clients = federation(clients=1, dtype=dtype)
    weight, bias = exact(clients, strength)[0]
    assert torch.equal(weight, clients[0].weight)
    assert torch.equal(bias, clients[0].bias)


@pytest.mark.parametrize("strength", [0.0, 0.1])
def test_clients_that_agree_stay_as_they_are(strength: float) -> None:
    first = federation()[0]
    clients = {k: client._replace(weight=first.weight, bias=first.bias) for k, client in federation(4).items()}
    for weight, bias in exact(clients, strength).values():
        torch.testing.assert_close(weight, first.weight, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(bias, first.bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("clients", "count", "features"), [(2, 3, 8), (3, 1, 8), (3, 10, 64), (5, 8, 64)])
def test_with_too_few_features_and_no_strength_the_step_is_the_shortest(
    clients: int, count: int, features: int
) -> None:
    assert_optimal(federation(clients, count, features), 0.0, tolerance=1e-7)


def test_features_that_are_all_alike() -> None:
    clients = {k: c._replace(features=c.features[:1].expand(9, -1)) for k, c in federation().items()}
    for strength in (0.0, 0.1):
        assert_optimal(clients, strength, tolerance=1e-8)


@pytest.mark.parametrize("strength", [1e-9, 1e-6, 1e-3])
def test_badly_conditioned_features(strength: float) -> None:
    """Singular values over twelve orders of magnitude, as those of a CNN whose features nearly agree."""
    decay = 10.0 ** -torch.arange(0, 12, 2).double()
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(5)).double()).Q
    clients = {k: c._replace(features=(c.features * decay) @ rotation) for k, c in federation(count=40).items()}
    gram = second_moments(clients[0].features) + second_moments(clients[1].features)
    assert torch.linalg.cond(gram) > 1e12
    assert_optimal(clients, strength, tolerance=1e-4)
    for index, solution in exact(clients, strength).items():
        weight, bias = stacked_least_squares(clients, index, strength)
        wanted = objective(clients, index, (torch.from_numpy(weight), torch.from_numpy(bias)), strength)
        assert objective(clients, index, solution, strength) <= wanted * (1 + 1e-9)


# ----------------------------------------------------------------- invariances


def test_the_order_of_the_clients_changes_nothing() -> None:
    clients = federation(clients=4)
    straight = exact(clients, 0.1)
    shuffled = exact({index: clients[index] for index in (2, 0, 3, 1)}, 0.1)
    assert list(shuffled) == [2, 0, 3, 1]
    for index in clients:
        torch.testing.assert_close(shuffled[index][0], straight[index][0], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(shuffled[index][1], straight[index][1], rtol=1e-11, atol=1e-11)


def test_every_teacher_weighs_the_same_however_many_features_it_has() -> None:
    clients = federation()
    repeated = {**clients, 1: clients[1]._replace(features=clients[1].features.repeat(5, 1))}
    for index, (weight, bias) in exact(clients, 0.1).items():
        torch.testing.assert_close(exact(repeated, 0.1)[index][0], weight, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(exact(repeated, 0.1)[index][1], bias, rtol=1e-10, atol=1e-10)


def test_a_students_own_features_have_no_part_in_its_solution() -> None:
    clients = federation()
    other = {**clients, 0: clients[0]._replace(features=clients[0].features.flip(1) * 3)}
    for one, two in zip(exact(clients, 0.1)[0], exact(other, 0.1)[0], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(exact(clients, 0.1)[1][0], exact(other, 0.1)[1][0])


def test_the_answer_has_the_uploads_dtype_and_leaves_it_alone() -> None:
    clients = federation(dtype=torch.float32)
    before = {index: [tensor.clone() for tensor in client] for index, client in clients.items()}
    solved = exact(clients, 0.1)
    for index, (weight, bias) in solved.items():
        assert weight.dtype == bias.dtype == torch.float32
        assert weight.shape == (OUTPUTS, FEATURES)
        assert bias.shape == (OUTPUTS,)
        assert all(torch.equal(*pair) for pair in zip(before[index], clients[index], strict=True))
    assert_optimal(clients, 0.1, tolerance=1e-5)


# ----------------------------------------------------------------- its parts


def test_sums_by_hand() -> None:
    client = Generator(torch.tensor([[2.0]]), torch.tensor([1.0]), torch.tensor([[1.0], [3.0]]))
    got = total(iter([client]))
    assert got.gram.tolist() == second_moments(client.features).tolist() == [[5, 2], [2, 1]]  # means of x x, x and 1
    assert got.target.tolist() == [[12], [5]]  # means of x (2 x + 1) and 2 x + 1
    assert got.energy == 29  # mean of (2 x + 1)^2
    assert matrix(client.weight, client.bias).tolist() == [[2], [1]]
    assert got.gram.dtype == got.target.dtype == got.energy.dtype == torch.float64
    for value, single in zip(total(iter([client] * 3)), got, strict=True):
        assert torch.equal(value, 3 * single)


@pytest.mark.parametrize("strength", [0.0, 0.3])
@pytest.mark.parametrize("count", [1, 4])
def test_the_objective_from_sums_is_that_of_eq_5(strength: float, count: int) -> None:
    clients = federation(clients=count)
    sums = total(clients.values())
    for index, client in clients.items():
        student = student_of(client, sums, strength)
        assert student.start == pytest.approx(objective(clients, index, client[:2], strength), rel=1e-10, abs=1e-10)
        for other in federation(clients=2, seed=9).values():
            value = student.objective(other.weight, other.bias)
            assert value == pytest.approx(objective(clients, index, other[:2], strength), rel=1e-10)


def test_one_eigendecomposition_serves_every_strength() -> None:
    clients = federation(clients=4, dtype=torch.float32)
    sums = total(clients.values())
    strengths = (1e-6, 0.1, 1.0, 1e6)
    for index, client in clients.items():
        path = student_of(client, sums, 1.0).path(strengths)
        for strength, (weight, bias) in zip(strengths, path, strict=True):
            wanted_weight, wanted_bias = exact(clients, strength)[index]
            torch.testing.assert_close(weight, wanted_weight, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(bias, wanted_bias, rtol=1e-5, atol=1e-6)


def test_ridge_by_hand() -> None:
    gram = torch.diag(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
    target = torch.tensor([[8.0], [3.0], [0.0]], dtype=torch.float64)
    assert ridge(gram, target, 1.0).flatten().tolist() == pytest.approx([1.6, 1.5, 0.0])
    assert ridge(gram, target, 0.0).flatten().tolist() == pytest.approx([2.0, 3.0, 0.0])
    assert ridge(0 * gram, 0 * target, 0.0).flatten().tolist() == [0, 0, 0]


def test_a_negative_strength_is_named() -> None:
    for server in (ExactO2D, IterativeO2D):
        with pytest.raises(ValueError, match=r"server\.strength is -0\.1, must be at least 0"):
            server(-0.1)
