"""The federation (Fed-LSCL, Algorithm 1): for each task, for each round: clients fit, the server answers, all evaluate.

It knows the server and the messages, and nothing of any method or of where the clients are.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer

from fedlscl import robust, seeds
from fedlscl.client import Client
from fedlscl.federation.callback import FederationCallback, RoundResult
from fedlscl.federation.secure.session import NoSum
from fedlscl.federation.store import Store
from fedlscl.federation.summing import SecureSums
from fedlscl.federation.template import Template
from fedlscl.federation.trainer import StepCount
from fedlscl.federation.transport import Fitted, Transport
from fedlscl.messages import Download, MessageError, Received, Upload, in_a_line, unusable
from fedlscl.schedule import Round, Schedule
from fedlscl.server import Answer, Answers, Context, Metrics, OnDemand, Total

log = logging.getLogger(__name__)
BEGUN = "begun"
"""Under which name the store notes which round has begun last, and how many were begun again."""

USUAL = "usual"
"""The name under which the store holds how large uploads are, see `fedlscl.robust.medians`."""

COMMON = "common"
"""The name under which the store holds the model that all clients were answered with last, as far as they send it."""

IMPOSSIBLE = (ArithmeticError, torch.linalg.LinAlgError, MessageError)  # type: ignore[attr-defined]
"""What a server raises that cannot go on with the numbers that it was sent."""


class NobodyLeft(RuntimeError):
    """A round that no client has taken part in to its end."""


@dataclass
class Federation:
    """Everything that takes part in a run, on the server's side.

    Args:
        schedule: who takes part when.
        template: what the clients' models and messages look like, the server, and its own data.
        store: the server's state and the run's progress.
        transport: leads to the clients.
    """

    schedule: Schedule
    template: Template
    store: Store
    transport: Transport

    def __post_init__(self) -> None:
        """Check that all fits together, and tell the server what it will hear."""
        self.clients, self.server = self.template.clients, self.template.server
        self.schedule.check(self.clients)
        self.template.begin()
        self.sums = SecureSums(self.schedule, self.template) if self.schedule.secure else None
        if self.sums is not None and self.template.client.privacy is not None and self.schedule.rounds > 1:
            raise ValueError(
                f"federation.rounds is {self.schedule.rounds}, but with federation.secure and model.privacy every "
                "further sum of a task adds noise, and hardly any images; take 1"
            )
        if self.server.server_images:
            self.server.hold(*self.template.data.server_images(self.server.server_images))
        self.setup_bytes = sum(tensor.nbytes for tensor in self.template.common_start.values())

    @property
    def history(self) -> list[RoundResult]:
        """The rounds that are in the store."""
        return [RoundResult.from_json(entry) for entry in self.store.progress.get("history", [])]

    @property
    def nodes(self) -> dict[str, str]:
        """By client which machine it was at, where its transport knows that."""
        return dict(getattr(self.transport, "nodes", {}))

    def run(self, callback: FederationCallback | None = None) -> Iterator[RoundResult]:
        """Algorithm 1 from the first round that the store does not hold; each is in the store when it is yielded.

        Raises:
            NobodyLeft: if nobody takes part in a round to its end; what was done before is in the store.
        """
        callback = callback or FederationCallback()
        history = self.store.progress.get("history", [])
        tasks, seed = self.template.data.split.spec.tasks, self.template.seed
        for round in self.schedule.after(len(history), tasks, seed):
            begun = self._begin(round)
            result = self._round(round, callback)
            callback.on_round_end(result)
            history = [*history, result.to_json()]
            self.store.commit({"round": round.number, "history": history, **begun, **callback.state_dict()})
            yield result

    def _begin(self, round: Round) -> dict[str, Any]:
        """With privacy, note that a round begins: if it is not the first time, images are released once more."""
        if self.template.client.privacy is None:
            return {}
        before = self.store.progress.get(BEGUN, {"round": 0, "repeated": 0})
        now = {"round": round.number, "repeated": before["repeated"] + (before["round"] == round.number)}
        self.store.commit({**self.store.progress, BEGUN: now})
        return {BEGUN: now}

    @property
    def released_again(self) -> int:
        """How many times more than was planned anything of an image may have left its client, at most.

        A client that was left out sends its sums once more; where they are secure, those of before are in no sum.
        """
        left_out = Counter(client for result in self.history for client in result.skipped)
        refused = 0 if self.schedule.secure else max(left_out.values(), default=0)
        repeated: int = self.store.progress.get(BEGUN, {"repeated": 0})["repeated"]
        return repeated + refused

    def _round(self, round: Round, callback: FederationCallback) -> RoundResult:
        """Clients fit, the server answers, all evaluate."""
        result = RoundResult(round.task, round.number)
        participants = self.schedule.participants(self.clients, round)
        if (state := self.store.read("server")) is not None:
            self.server.load(state)
        self._learned = self._last_tasks(round.task - 1)
        sent: Received | Total
        if self.sums is None:
            sent = self._fit(round, participants, result, callback)
        elif self._all_sent(round, participants):
            participants, sent = [], Received()
        else:
            sent = self._sum(self.sums, round, participants, result, callback)
        answers: Answers = {}
        if sent:
            callback.on_received(round.task, round.number, sent)
            with result.timed("aggregate"):
                try:
                    answers, metrics = self._aggregate(sent, round, callback)
                    result.server = dict(metrics)
                except IMPOSSIBLE as error:
                    if self.sums is not None:  # nobody knows whose fault it is, and what was added up is not kept
                        raise NobodyLeft(
                            f"nothing follows from the secure sum of round {round.number}: {in_a_line(error)}"
                        ) from error
                    log.warning("no client has an answer in round %d: %s", round.number, in_a_line(error))
                    result.unanswered = dict.fromkeys(range(self.clients), in_a_line(error))
        self._answer(round, answers, set(participants) - set(result.skipped), result)
        with result.timed("evaluate"):
            found = self.transport.evaluations(round)
        if not found and round.ends_task:
            raise NobodyLeft(
                f"no client has ended round {round.number}, the last of its task, so that nobody knows how good "
                "the models are; start the run again to repeat the round"
            )
        for index in range(self.clients):
            for mask, by_client in result.accuracy.items():
                by_client.append(found[index][mask] if index in found else [math.nan] * round.task)
        return result

    def _fit(
        self, round: Round, participants: list[int], result: RoundResult, callback: FederationCallback
    ) -> Received:
        """Let the clients train; the uploads that can be used."""
        uploads = Received()
        with result.timed("fit"):
            for fitted in self.transport.fit(round, participants, self.server.listens, callback):
                self._receive(fitted, result, uploads)
            self._compare(uploads, result)
        if len(result.skipped) == len(participants):
            raise NobodyLeft(f"no client finished round {round.number}: {_reasons(result)}")
        return uploads

    def _sum(
        self, sums: SecureSums, round: Round, participants: list[int], result: RoundResult, callback: FederationCallback
    ) -> Total:
        """Let the clients train; the sums of what they send.

        Raises:
            NobodyLeft: if there is no sum, or one that cannot be right: what clients did in the round does not count.
        """
        images = [self._agreed(client, round.task) for client in participants]
        most = None if None in images else max(n for n in images if n is not None)
        with result.timed("fit"):
            try:
                total = sums.total(self.transport, round, participants, most, result, callback)
            except NoSum as error:
                others = f"; {_reasons(result)}" if result.skipped else ""
                raise NobodyLeft(f"no secure sum in round {round.number}: {error}{others}") from error
        agreed = [self._agreed(client, round.task) for client in total.clients]
        if None not in agreed and total.samples != (known := sum(n for n in agreed if n is not None)):
            raise NobodyLeft(
                f"no secure sum in round {round.number}: it is over {total.samples} samples, and the split gives its "
                f"clients {known}"
            )
        return total

    def _answer(self, round: Round, answers: Answers, accepted: set[int], result: RoundResult) -> None:
        """Tell every client the end of the round, and let it be tested."""
        of_answers: dict[str, list[float]] = {}
        for index in range(self.clients):
            message = None
            if index in answers:
                with result.timed("aggregate"):
                    try:
                        answer = self._usable(answers[index], index)
                        message = Download(index, round.task, round.number, 0, answer.tensors).to_bytes()
                    except IMPOSSIBLE as error:
                        log.warning("client %d has no answer in round %d: %s", index, round.number, in_a_line(error))
                        result.unanswered[index] = in_a_line(error)
            if message is not None:
                for name, value in answer.metrics.items():
                    of_answers.setdefault(name, []).append(value)
                result.bytes_down[index] = result.bytes_down.get(index, 0) + len(message)
            with result.timed("download"):
                self.transport.answer(round, index, message, index in accepted)
            with result.timed("evaluate"):
                self.transport.evaluate(round, index)
        result.server |= {n: float(torch.tensor(v, dtype=torch.float64).mean()) for n, v in of_answers.items()}

    def _receive(self, fitted: Fitted, result: RoundResult, uploads: Received) -> None:
        """Put an upload among the others; a client that sends what cannot be used is left out, the reason on record."""
        problem = fitted.problem
        if fitted.upload is not None and problem is None:
            try:
                self._take(fitted.client, fitted.upload, result, uploads)
            except MessageError as error:
                problem = in_a_line(f"{type(error).__name__}: {error}")
                log.warning("client %d is left out of round %d: %s", fitted.client, result.round, problem)
        if problem is not None:
            result.skipped[fitted.client] = in_a_line(problem)

    def _take(self, client: int, message: bytes, result: RoundResult, uploads: Received) -> None:
        result.bytes_up[client] = len(message)
        upload = Upload.from_bytes(message, self.template.model_of(client).upload_schema())
        if (upload.client, upload.round, upload.task) != (client, result.round, result.task):
            said = f"upload claims to be of client {upload.client}, round {upload.round}, task {upload.task}"
            raise MessageError(said)
        if upload.samples < 1:
            raise MessageError("upload claims that no sample is behind it")
        if (agreed := self._agreed(client, result.task)) is not None and upload.samples != agreed:
            raise MessageError(f"upload claims {upload.samples} samples, and the split gives this client {agreed}")
        self.server.check(upload)
        uploads.add(upload, self.store.put_aside(f"upload-{client}", message))

    def _agreed(self, client: int, task: int) -> int | None:
        """How many samples are behind an upload, those of all tasks since the last one; None if nobody knows."""
        of_tasks = self.template.data.samples_of(client)
        # a method with another training set has other numbers, which only its clients know
        if not of_tasks or type(self.template.first).training_set is not Client.training_set:
            return None
        return sum(of_tasks[self._learned[client] : task])

    def _last_tasks(self, until: int) -> list[int]:
        """The last task, up to `until`, in which each client sent something of its images; 0 for none."""
        learned = [0] * self.clients
        for past in self.history:
            then = next(self.schedule.after(past.round - 1, past.task, self.template.seed))
            if past.task <= until and self.template.client.sends_images(then):
                for client in self.schedule.participants(self.clients, then):
                    if client not in past.skipped:
                        learned[client] = past.task
        return learned

    def _all_sent(self, round: Round, participants: list[int]) -> bool:
        """Whether it is on record that a round's clients have sent all that there is of the task: no sum is needed."""
        if not self.template.client.sends_once:
            return False
        last = self._last_tasks(round.task)
        return all(last[client] == round.task for client in participants)

    def _compare(self, uploads: Received, result: RoundResult) -> None:
        """Leave out by name whose upload the server finds out of place among the others."""
        found: dict[int, robust.Sizes] = {}
        common = {**self.template.common_start, **(self.store.read(COMMON) or {})}
        for client, upload in uploads.items():
            found[client] = {**robust.sizes(upload.tensors), **robust.change(upload.tensors, common)}
            if self._agreed(client, result.task) is None:
                found[client] = {**found[client], robust.SAMPLES: upload.samples}
        stored = self.store.read(USUAL)
        before = robust.sizes(self.template.common_start)
        before |= {} if stored is None else {name: float(size) for name, size in stored.items()}
        for client, reason in self.server.compare(found, before).items():
            log.warning("client %d is left out of round %d: %s", client, result.round, reason)
            result.skipped[client] = reason
            uploads.leave_out(client)
            del found[client]
        if len(found) > 2:
            usual = {**before, **robust.medians(found)}
            self.store.write(USUAL, {n: torch.tensor(size, dtype=torch.float64) for n, size in usual.items()})

    def _usable(self, answer: Answer, client: int) -> Answer:
        """An answer as it is, if it can be sent.

        Raises:
            MessageError: if it holds numbers that no client would take.
        """
        schema = self.template.model_of(client).download_schema()
        known = {name: tensor for name, tensor in answer.tensors.items() if name in schema}
        if problem := unusable(known, schema):
            raise MessageError(f"the server's answer: {problem}")
        return answer

    def _aggregate(self, sent: Received | Total, round: Round, callback: FederationCallback) -> tuple[Answers, Metrics]:
        """Ask the server; if it cannot answer, it is as it was before.

        Raises:
            MessageError: if what it would remember, or answer, cannot be used.
        """
        before = {name: tensor.clone() for name, tensor in self.server.state().items()}
        logger = callback.on_aggregate_start(round.task, round.number)

        def trainer() -> Trainer:
            made = self.template.trainer(logger)
            made.callbacks.append(StepCount(callback.on_aggregate_step))  # type: ignore[attr-defined]
            return made

        context = Context(self.clients, round, trainer, self.template.common_start)
        try:
            with seeds.seeded(self.template.seed, "aggregate", round.number):
                if isinstance(sent, Total):
                    answers, metrics = self.server.from_sums(sent, context)
                else:
                    answers, metrics = self.server.aggregate(sent, context)
            state = self.server.state()
            if broken := [n for n, t in state.items() if t.is_floating_point() and not bool(t.isfinite().all())]:
                raise MessageError(f"the server would have to remember '{broken[0]}' with NaN or infinite values")
            if not isinstance(answers, OnDemand):
                different = {id(answer): (client, answer) for client, answer in answers.items()}
                for client, answer in different.values():
                    self._usable(answer, client)
        except IMPOSSIBLE:
            if before:
                self.server.load(before)
            raise
        if state:
            self.store.write("server", state)
        alike = not isinstance(answers, OnDemand) and len(answers) == self.clients and len(different) == 1
        if alike and not isinstance(sent, Total):  # of sums there are no uploads to compare
            schema = self.template.first.upload_schema()
            common = {name: tensor for name, tensor in answers[0].tensors.items() if name in schema}
            if common:
                self.store.write(COMMON, common)
        return answers, metrics

    def cost(self) -> dict[str, dict[str, int]]:
        """For the CNN of each name what a client with it trains and computes, see `Worker.cost`; none if none says."""
        counts: dict[str, dict[str, int]] = {}
        for index in range(self.clients):
            name = self.template.cnn.name_of(index)
            if name not in counts and (found := self.transport.cost(index)):
                counts[name] = found
        return counts


def _reasons(result: RoundResult) -> str:
    """Who was left out of a round so far, and why."""
    why: dict[str, list[int]] = {}
    for index, problem in sorted(result.skipped.items()):
        why.setdefault(problem, []).append(index)
    return "; ".join(f"client {', '.join(map(str, who))}: {problem}" for problem, who in why.items())
