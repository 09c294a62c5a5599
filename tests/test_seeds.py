"""Streams of random numbers: named, independent, the same everywhere, and never the global ones."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from fedlscl.seeds import derive, generator, seeded

PURPOSES = (
    "server",
    "client",
    "order",
    "selection",
    "fit",
    "participants",
    "aggregate",
    "distillation",
    "consolidation",
)


def test_a_stream_has_the_same_seed_for_ever() -> None:
    """A change here changes every number of every run: only ever on purpose."""
    assert derive(42, "order", 3, 7) == 7434541547492278081
    assert derive(42, "order", 3, 7) == derive(42, "order", 3, 7)
    assert torch.randint(1000, (4,), generator=generator(42, "order", 3, 7)).tolist() == [879, 50, 277, 248]


def test_no_two_streams_of_a_run_are_alike() -> None:
    numbers = (0, 1, 2, 3, 41, 42)
    keys = [(purpose, *rest) for purpose in PURPOSES for n in range(3) for rest in itertools.product(numbers, repeat=n)]
    seeds = [derive(seed, *key) for seed in (0, 1, 42, 43) for key in keys]
    assert len(set(seeds)) == len(seeds)


def test_the_order_and_kind_of_keys_count() -> None:
    assert derive(0, "fit", 1, 2) != derive(0, "fit", 2, 1)
    assert derive(0, "fit", "order") != derive(0, "order", "fit")
    assert derive(0, "1") != derive(0, 1)
    assert derive(1, 0) != derive(0, 1)
    assert derive(0, "ab", "c") != derive(0, "a", "bc")


def test_a_seed_fits_every_generator() -> None:
    seeds = [derive(k, "client", k) for k in range(2000)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62
    ones = [bin(seed).count("1") for seed in seeds]
    assert sum(ones) / len(ones) == pytest.approx(31.5, abs=0.5)


def test_seeds_of_a_run_can_be_large() -> None:
    assert len({derive(seed, "order", 1) for seed in (0, 2**31, 2**32, 2**32 + 1, 2**63 - 1)}) == 5


def test_neighbouring_streams_do_not_resemble_each_other() -> None:
    draws = np.array([torch.randn(500, generator=generator(0, "order", k, 1)).numpy() for k in range(20)])
    correlation = np.corrcoef(draws) - np.eye(20)
    assert np.abs(correlation).max() < 0.25


def test_a_stream_does_not_depend_on_what_was_drawn_before() -> None:
    alone = torch.rand(3, generator=generator(5, "fit", 1))
    generator(5, "fit", 0).manual_seed(3)
    torch.rand(10, generator=generator(5, "fit", 2))
    assert torch.equal(torch.rand(3, generator=generator(5, "fit", 1)), alone)


def test_inside_seeded_torch_draws_from_the_stream_and_afterwards_from_where_it_was() -> None:
    torch.manual_seed(123)
    torch.rand(3)
    before = torch.random.get_rng_state()
    others = (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]
    with seeded(0, "client", 1):
        inside = torch.rand(5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == others  # type: ignore[index]

    torch.manual_seed(999)
    with seeded(0, "client", 1):
        assert torch.equal(torch.rand(5), inside)
    with seeded(0, "client", 2):
        assert not torch.equal(torch.rand(5), inside)
    assert torch.equal(inside, torch.rand(5, generator=generator(0, "client", 1)))


def test_seeded_restores_the_state_also_after_an_error_and_when_nested() -> None:
    before = torch.random.get_rng_state()
    with pytest.raises(RuntimeError), seeded(0, "a"):
        torch.rand(1, out=torch.empty(1, dtype=torch.int64))
    assert torch.equal(torch.random.get_rng_state(), before)
    with seeded(0, "a"):
        first = torch.rand(1)
        with seeded(0, "b"):
            torch.rand(7)
        second = torch.rand(1)
    with seeded(0, "a"):
        assert torch.equal(torch.cat([first, second]), torch.rand(2))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_making_a_stream_leaves_the_global_state_alone() -> None:
    before = torch.random.get_rng_state()
    torch.rand(4, generator=generator(1, "x"))
    assert torch.equal(torch.random.get_rng_state(), before)
