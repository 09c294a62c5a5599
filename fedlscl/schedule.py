"""Who learns what and when: the rounds of a federation and the clients that take part in each."""

from __future__ import annotations

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


class Schedule:
    """Who takes part when.

    Args:
        rounds: R, communication rounds for each task.
        clients_per_round: how many clients, drawn anew, take part in each round; all of them by default. A client
            that was absent trains on all it has missed when it is drawn again.
    """

    def __init__(self, rounds: int = 5, clients_per_round: int | None = None) -> None:
        at_least(1, "federation", rounds=rounds)
        self.rounds, self.clients_per_round = rounds, clients_per_round

    def check(self, clients: int) -> None:
        """Raise ValueError if the schedule does not fit the number of clients."""
        if self.clients_per_round is not None and not 1 <= self.clients_per_round <= clients:
            raise ValueError(
                f"federation.clients_per_round is {self.clients_per_round}, must be between 1 and the {clients} clients"
            )

    def after(self, done: int, tasks: int, seed: int) -> Iterator[Round]:
        """The rounds of `tasks` tasks that follow the first `done`."""
        for number in range(done + 1, tasks * self.rounds + 1):
            yield Round((number - 1) // self.rounds + 1, number, number % self.rounds == 0, seed)

    def participants(self, clients: int, round: Round) -> list[int]:
        """The clients that take part in a round, ascending."""
        rng = np.random.default_rng(seeds.derive(round.seed, "participants", round.number))
        drawn = rng.choice(clients, self.clients_per_round or clients, replace=False)
        return sorted(int(index) for index in drawn)
