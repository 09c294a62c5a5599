"""Who learns what and when, and who sees what is sent: a federation's rounds and the clients that take part in each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fedlscl import seeds
from fedlscl.checks import at_least


@dataclass(frozen=True)
class Round:
    """One communication round, as its clients and its server hear of it.

    Args:
        task: which task is learned, from 1.
        number: of the round, counted over all tasks, from 1.
        ends_task: whether it is the last of its task.
        seed: of the run, for what is drawn.
    """

    task: int
    number: int
    ends_task: bool
    seed: int


FEWEST = 3
"""Clients behind a secure sum, since of a sum of two each knows the other's part."""


class Schedule:
    """Who takes part when, and whether the server sees what each of them sends.

    Args:
        rounds: R, communication rounds for each task.
        clients_per_round: how many clients, drawn anew, take part in each round; all of them by default. A client
            that was absent trains on all it has missed when it is drawn again.
        secure: `true` for secure sums: the server learns the sum over the clients and nothing of a single one, see
            docs/privacy.md. For servers that need no more than sums.
        threshold: with secure sums, the part of a round's clients that must get to its end, above a half; by default
            two thirds. As many together with the server could find out what another has sent.
        fraction_bits: with secure sums, bits behind the point of all that is added up. The fewer, the larger values may
            be: below 2^(63 - bits) / clients. By default 30, and of what clients go on training from, such as means of
            weights, as many as leave room for weights below 256.
    """

    def __init__(
        self,
        rounds: int = 5,
        clients_per_round: int | None = None,
        secure: bool | None = None,
        threshold: float | None = None,
        fraction_bits: int | None = None,
    ) -> None:
        at_least(1, "federation", rounds=rounds)
        self.rounds, self.clients_per_round, self.secure = rounds, clients_per_round, bool(secure)
        for name, value in (("threshold", threshold), ("fraction_bits", fraction_bits)):
            if value is not None and not secure:
                raise ValueError(f"federation.{name} is {value}, which is for secure sums; set federation.secure true")
        self.threshold = 2 / 3 if threshold is None else threshold
        if not 0.5 < self.threshold <= 1:
            raise ValueError(f"federation.threshold is {threshold}, must be above 0.5 and at most 1")
        self.fraction_bits = fraction_bits
        if fraction_bits is not None and not 1 <= fraction_bits <= 52:
            raise ValueError(f"federation.fraction_bits is {fraction_bits}, must be from 1 to 52")

    def check(self, clients: int) -> None:
        """Raise ValueError if the schedule does not fit the number of clients."""
        if self.clients_per_round is not None and not 1 <= self.clients_per_round <= clients:
            raise ValueError(
                f"federation.clients_per_round is {self.clients_per_round}, must be between 1 and the {clients} clients"
            )
        taking_part = self.clients_per_round or clients
        if self.secure and taking_part < FEWEST:
            raise ValueError(
                f"federation.secure is true, but {taking_part} clients take part in a round, must be {FEWEST} or more: "
                "of a sum of two each knows the other's part"
            )

    def least(self, taking_part: int) -> int:
        """How many of a round's clients must get to the end of a secure sum; always more than half of them."""
        return max(taking_part // 2 + 1, math.ceil(self.threshold * taking_part - 1e-9))

    def after(self, done: int, tasks: int, seed: int) -> Iterator[Round]:
        """The rounds of `tasks` tasks that follow the first `done`."""
        for number in range(done + 1, tasks * self.rounds + 1):
            yield Round((number - 1) // self.rounds + 1, number, number % self.rounds == 0, seed)

    def participants(self, clients: int, round: Round) -> list[int]:
        """The clients that take part in a round, ascending."""
        rng = np.random.default_rng(seeds.derive(round.seed, "participants", round.number))
        drawn = rng.choice(clients, self.clients_per_round or clients, replace=False)
        return sorted(int(index) for index in drawn)
