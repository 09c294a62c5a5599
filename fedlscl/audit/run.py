"""A finished run as an attacker's laboratory: what the server received, the truth behind it, and images of nobody."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlscl import seeds
from fedlscl.client import Client
from fedlscl.data.source import Part
from fedlscl.federation import store as checkpoint
from fedlscl.federation.template import Template
from fedlscl.federation.worker import Worker
from fedlscl.files import content_of
from fedlscl.messages import Download, Upload
from fedlscl.run.configuration import Configuration
from fedlscl.run.folder import CHECKPOINT, CONFIG, SPLIT, SUMMARY, RunFolder
from fedlscl.run.received import Sight, kept
from fedlscl.run.summary import Summary, contradictory
from fedlscl.server import Answer, Context, Server, Total

BATCH = 128
LARGEST_LOSS = 1e4
PUBLIC_LEAST = 5
"""Images that nobody trains on, a class: with fewer, half of the test images stand for public ones."""
PUBLIC_MOST = 60
"""Of these so many of each class are public, where there are more: each costs a pass through every attacked model."""

State = Literal["end", "start", "imitated"]
"""Which of a client's models: as the run left it, as it was before the first round, or as a server can imitate it."""


class Pool(NamedTuple):
    """Some images of the data set."""

    part: Part
    indices: Tensor  # (n,)
    labels: Tensor  # (n,)

    def only(self, rows: Tensor) -> Pool:
        """Those at some places."""
        return Pool(self.part, self.indices[rows], self.labels[rows])


class AuditedRun:
    """A finished run whose received messages were kept.

    Args:
        folder: its folder.
        words: fields that are other in the audit than in the run, for instance the server's iterations.

    Raises:
        FileNotFoundError: if it holds no finished run, or not what its server received.
        ValueError: if data or weights are not the run's.
    """

    def __init__(self, folder: Path, words: Sequence[str] = ()) -> None:
        if content_of(folder / SUMMARY) is None:
            raise FileNotFoundError(
                f"run_dir '{folder}' holds no finished run, without {SUMMARY}; give the folder that `fedlscl fit` named"
            )
        self.folder, self.summary = folder, Summary.read(folder / SUMMARY)
        self.sights = kept(folder)
        experiment = Configuration(["--config", str(folder / CONFIG), "--run_dir", str(folder), *words]).build()
        experiment.load()
        self.seed, self.template, self.schedule = experiment.seed, experiment.template(), experiment.schedule
        self.data = self.template.data
        files = RunFolder(folder)
        stored = json.loads(files.needed(SPLIT, files.sums()))
        for name, now in (
            ("split_sha256", self.data.split_sha256),
            ("data_sha256", self.data.dataset.sha256 if self.data.dataset.complete else None),
            ("weights_sha256", self.template.vit.weights_sha256),
        ):
            if now and stored.get(name) and contradictory(now, stored[name]):
                raise ValueError(f"{name} is {now[:12]}, and that of the run in '{folder}' {stored[name][:12]}")
        self.template.begin()
        server = self.template.server
        if server.server_images:
            server.hold(*self.data.server_images(server.server_images))
        self.worker = Worker(self.template)
        self._restored: tuple[int, State] | None = None
        self._imitated: dict[int, dict[str, Tensor]] = {}
        self._features: dict[tuple[object, ...], Tensor | None] = {}
        self._public()
        self.common = False  # whether all clients' features are those of one model, which does not change
        some = self.public.only(torch.arange(min(4, len(self.public.indices))))
        last = self.template.clients - 1
        start, ends = self.features(0, "start", some), [self.features(k, "end", some) for k in (0, last)]
        self.common = start is not None and all(end is not None and torch.equal(start, end) for end in ends)

    # ---- images

    def _public(self) -> None:
        """Images of nobody: left-over training images, or every other test image where there are too few."""
        data, split = self.data, self.data.split
        taken = np.zeros(len(data.dataset.train.labels), dtype=bool)
        for client in split.clients:
            for task in client.tasks:
                taken[task.train] = True
                if split.evaluate_on == "train":
                    taken[task.test] = True
        left, test = np.flatnonzero(~taken), np.arange(len(data.dataset.test.labels))
        self.halved = len(left) < PUBLIC_LEAST * data.num_classes
        of_each = [left[data.dataset.train.labels[left] == label][:PUBLIC_MOST] for label in range(data.num_classes)]
        self.public = (
            self.pool("test", test[::2]) if self.halved else self.pool("train", np.sort(np.concatenate(of_each)))
        )
        self.test_part = split.evaluate_on

    def pool(self, part: Part, indices: NDArray[np.int64] | Tensor) -> Pool:
        """Images of one part of the data set."""
        places = torch.as_tensor(indices)
        chosen = self.data.dataset.train if part == "train" else self.data.dataset.test
        return Pool(part, places, torch.as_tensor(chosen.labels[places.numpy()]))

    def members(self, client: int, sight: Sight) -> dict[str, Pool]:
        """By what they are called, the training images of a client that may show in what was received."""
        tasks = self.data.split.clients[client].tasks
        of_task = self.pool("train", np.concatenate([tasks[sight.task - 1].train]))
        kind = self.template.first.discloses
        if kind != "buffer":
            return {"training images of the task": of_task}
        trained = self.pool("train", np.concatenate([task.train for task in tasks[: sight.task]]))
        buffered = self.pool("train", self.client(client, "end").memory.remembered)
        return {"images in the buffer": buffered, "all training images": trained}

    def others(self, client: int, members: Pool, seed: int = 0) -> tuple[Pool, Pool]:
        """As many members and test images of each class: (members, others), so that no class tells them apart."""
        tasks = self.data.split.clients[client].tasks
        test = np.unique(np.concatenate([task.test for task in tasks]))
        if self.test_part == "test" and self.halved:
            test = test[test % 2 == 1]
        pool, rng = self.pool(self.test_part, test), seeds.generator(self.seed, "audit", client, seed)
        chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
        for label in torch.unique(members.labels).tolist():
            places = [(one.labels == label).nonzero().flatten() for one in (members, pool)]
            count = min(map(len, places))
            for found, of_class in zip(chosen, places, strict=True):
                found.append(of_class[torch.randperm(len(of_class), generator=rng)[:count]])
        return members.only(torch.cat(chosen[0])), pool.only(torch.cat(chosen[1]))

    def pixels(self, pool: Pool) -> Tensor:
        """(n, 3, H, W) uint8."""
        return self.data.batch(pool.part, pool.indices)[0]

    # ---- models

    def client(self, index: int, state: State) -> Client:
        """A client's model at the end of the run, or before its first round, as follows from the run's seed."""
        if self._restored != (index, state):
            if state == "start":
                self.worker.restore(index, None, self.template.start_message(index))
            elif state == "end":
                end = checkpoint.read(self.folder / CHECKPOINT, checkpoint.client_name(index))
                self.worker.restore(index, end, None)
            else:
                if index not in self._imitated:
                    self._imitated[index] = self._imitate(index)
                self.worker.restore(index, self._imitated[index], None)
            self._restored = index, state
        return self.template.model_of(index).eval()

    def _imitate(self, index: int) -> dict[str, Tensor]:
        """A client's state after it has learned its classes on public images, from its first weights, by itself."""
        data, alone = copy(self.data), self.data.split.only([index])
        own = alone.clients[index]
        held = [self.public.indices[torch.isin(self.public.labels, torch.tensor(task.classes))] for task in own.tasks]
        tasks = (replace(task, train=images.numpy()) for task, images in zip(own.tasks, held, strict=True))
        clients = list(alone.clients)
        clients[index] = replace(own, tasks=tuple(tasks))
        data.split = replace(alone, clients=tuple(clients))
        one = self.template
        worker = Worker(Template(one.client, data, one.vit, one.cnn, one.seed, one.trainer, one.server))
        state: dict[str, Tensor] | None = None
        for round in self.schedule.after(0, len(own.tasks), self.seed):
            body = worker.restore(index, state, one.start_message(index))
            state = worker.fit(body, round, None)
        assert state is not None  # there is a round at least
        return state

    def features(self, index: int, state: State, pool: Pool) -> Tensor | None:
        """(n, e) what a client's uploads hold of images, by one of its models."""
        key = (None if self.common else (index, state), pool.part, pool.indices.numpy().tobytes())
        if key not in self._features:
            body = self.client(index, state)
            with torch.no_grad():
                found = [body.disclosed(images) for images in torch.split(self.pixels(pool), BATCH)]
            known = [one for one in found if one is not None]
            self._features[key] = torch.cat(known) if known else None
        return self._features[key]

    def losses(self, answer: Answer, index: int, task: int, pools: Sequence[Pool]) -> list[Tensor] | None:
        """(n,) for each pool the cross-entropy of the model that an answer is, or None if it is no whole model.

        Among the classes that the client has learned; one of which the model knows nothing gives `LARGEST_LOSS`.
        """
        self._restored = None
        body = self.worker.restore(index, None, self.template.start_message(index))
        shared = {tensor.data_ptr() for tensor in body.shared().values()}
        if any(p.requires_grad and p.data_ptr() not in shared for p in body.parameters()):
            return None
        body.memory.begin(task)
        self.worker.apply(body, Download(index, task, 1, 0, answer.tensors).to_bytes())
        body.eval()
        classes, found = body.data.class_mask(0, task), list[Tensor]()
        with torch.no_grad():
            for pool in pools:
                logits = torch.cat(
                    [body(x, body.precompute(x)).logits for x in torch.split(self.pixels(pool), BATCH)]
                ).float()
                logits = logits.masked_fill(~classes, -torch.inf)
                losses = torch.nn.functional.cross_entropy(logits, pool.labels, reduction="none")
                found.append(losses.clamp(max=LARGEST_LOSS))
        return found

    # ---- what was received

    def richer(self, client: int) -> list[Sight]:
        """The uploads of a client that hold more than its last one."""
        own = [sight for sight in self.sights if sight.clients == (client,) and not sight.summed]
        return [sight for sight in own if set(sight.tensors) - set(own[-1].tensors)]

    def uploads(self) -> list[Sight]:
        """What to attack: what each client sent last, or last of each task where it is of that task's images alone."""
        return self._last([sight for sight in self.sights if not sight.summed])

    def totals(self) -> list[Sight]:
        """The same of sums over the clients, received as such or what secure sums would have made of the uploads."""
        if sums := [sight for sight in self.sights if sight.summed]:
            return self._last(sums)
        server = self.template.server
        if server.beyond_sums() is not None:
            return []
        found: dict[int, Sight] = {}
        for sight in self.sights:
            upload = Upload(sight.clients[0], sight.task, sight.round, sight.samples, sight.tensors)
            terms = {name: tensor.double() for name, tensor in server.terms(upload).items()}
            if (so_far := found.get(sight.round)) is None:
                found[sight.round] = replace(sight, summed=True, tensors=terms)
            else:
                added = {name: tensor + terms[name] for name, tensor in so_far.tensors.items()}
                who, samples = (*so_far.clients, *sight.clients), so_far.samples + sight.samples
                found[sight.round] = replace(so_far, clients=who, samples=samples, tensors=added)
        return self._last([*found.values()])

    def _last(self, sights: Sequence[Sight]) -> list[Sight]:
        """Of each client, or sum, the last that says anything; of each task, where a message is of its images."""
        each_task = self.template.first.discloses == "task"
        found: dict[tuple[object, ...], Sight] = {}
        for sight in sights:
            if any(bool(tensor.any()) for tensor in sight.tensors.values()):
                found[(() if sight.summed else sight.clients), sight.task if each_task else 0] = sight
        return [*found.values()]

    def answer(self, sight: Sight) -> Answer | None:
        """What a server would answer that has received nothing else: the model that follows from it."""
        server, context = self._alone(), self.context(sight)
        if sight.summed:
            answers, _ = server.from_sums(Total(sight.clients, sight.samples, sight.tensors), context)
        else:
            answers, _ = server.aggregate({sight.clients[0]: self._upload(sight)}, context)
        return answers.get(sight.clients[0])

    def made_images(self, sight: Sight) -> tuple[Tensor, Tensor] | None:
        """Images (n, 3, H, W) in 0..1 and labels (n,) that the server makes of an upload, if it makes any."""
        server = self._alone()
        before = {name for name in server.state() if name.endswith(".images")}
        if not before or sight.summed:
            return None
        with seeds.seeded(self.seed, "audit", sight.round):
            server.aggregate({sight.clients[0]: self._upload(sight)}, self.context(sight))
        for name in before:
            images, labels = server.state()[name], server.state()[name.removesuffix("images") + "labels"]
            if len(images):
                return images, labels
        return None

    def context(self, sight: Sight) -> Context:
        """What a server knows of a round."""
        round = next(self.schedule.after(sight.round - 1, sight.task, self.seed))
        return Context(self.template.clients, round, lambda: self.template.trainer(None), self.template.common_start)

    def _alone(self) -> Server:
        """The server as it was before the first round."""
        return deepcopy(self.template.server)

    @staticmethod
    def _upload(sight: Sight) -> Upload:
        return Upload(sight.clients[0], sight.task, sight.round, sight.samples, sight.tensors)
