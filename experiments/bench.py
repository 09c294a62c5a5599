"""Measure the engine. Each part prints a table; all compare side by side in one run, since machines drift.

python experiments/bench.py [PART ...] [--threads N] [--json FILE] [--tiny]

prefix        a client's round with the frozen blocks computed once for each image, and in every step
replay        a replay step beside a collaborative step
throughput    images a second of a client's round beside the same algorithm written plainly
hardware      FLOP/s of a client's step beside those of a large matrix product
framework     `fedlscl fit` beside the same training as a bare PyTorch loop
distillation  exact O2D beside iterative O2D; exact O2D for 5, 50 and 500 clients
clients       a client's round, memory and start-up for 5, 50 and 500 clients
device        what would travel to an accelerator, or wait for it, while a federation goes on, read off a profile

Images are noise and the large ViTs are untrained: neither changes the time. FLOPs are counted by torch, and a product
and a sum are two.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch.profiler import profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from fedlscl import seeds
from fedlscl.cli import main
from fedlscl.client import Client
from fedlscl.data.source import Dataset, ImageSet, Source
from fedlscl.evaluation import MASKS
from fedlscl.federation.trainer import RoundTrainer
from fedlscl.federation.worker import Worker
from fedlscl.messages import Received, TensorSpec, Upload
from fedlscl.methods import o2d as distillation
from fedlscl.methods.fed_lscl import ExactO2D, FedLSCL, IterativeO2D
from fedlscl.models.adapters import LowRank
from fedlscl.run.configuration import Configuration
from fedlscl.run.experiment import Experiment
from fedlscl.schedule import Round
from fedlscl.server import Context

HERE = Path(__file__).parent
Row = dict[str, Any]


class Noise(Source):
    """Random images."""

    def __init__(self, classes: int = 16, train: int = 20, test: int = 10, size: int = 32) -> None:
        self.classes, self.train, self.test, self.size = classes, train, test, size

    def load(self, cache_dir: Path) -> Dataset:
        """Draw them."""
        rng = np.random.default_rng(0)

        def draw(count: int) -> ImageSet:
            labels = np.repeat(np.arange(self.classes), count)
            return ImageSet(rng.integers(0, 256, (len(labels), 3, self.size, self.size), dtype=np.uint8), labels)

        return Dataset("noise", draw(self.train), draw(self.test), tuple(map(str, range(self.classes))))


# Like experiments/cifar100_small.yaml, with noise for images, fewer classes and an untrained ViT
CIFAR = [
    f"--config={HERE / 'cifar100_small.yaml'}",
    *("--data.source=bench.Noise", "--data.source.classes=40", "--data.source.test=5", "--backbone.pretrained=false"),
    *("--data.split.private_classes=6", "--data.split.public_classes=10", "--data.split.min_public_images=2"),
    *("--data.split.tasks=2", "--federation.rounds=1", "--seed_everything=0"),
]
DIGITS = [f"--config={HERE / 'digits.yaml'}"]


@dataclass(frozen=True)
class Scale:
    """How large everything is; `words` follow every command line."""

    repeat: int = 3
    warmup: int = 1  # rounds that are not timed
    models: int | None = None  # of those of a part, so many
    clients: tuple[int, ...] = (5, 50, 500)
    width: int = 512
    outputs: int = 3072
    features: int = 800
    product: int = 3072
    words: tuple[str, ...] = ()
    federation: tuple[str, ...] = ()  # words for federations and clients with the images of a setting


TINY = Scale(
    repeat=1,
    warmup=0,
    models=1,
    clients=(2, 3),
    width=8,
    outputs=12,
    features=5,
    product=64,
    words=(
        *("--backbone.image_size=32", "--backbone.weights=null"),
        "--backbone.model_args={patch_size: 16, embed_dim: 24, depth: 12, num_heads: 3}",
        *("--cnn.image_size=16", "--cnn.features=8"),
        "--cnn.model_args={channels: [4, 4, 8, 8], layers: [1, 1, 1, 1], norm_layer: groupnorm1}",
    ),
    federation=(
        *("--data.split.clients=2", "--data.split.min_public_images=2", "--federation.rounds=1"),
        *("--data.split.train_per_class=5", "--data.split.test_per_class=2", "--model.batch_size=16"),
    ),
)
scale = Scale()


def experiment(words: Sequence[str], run_dir: str) -> Experiment:
    """What the command line `fedlscl fit` makes of these words."""
    described = Configuration([*words, *scale.words, f"--run_dir={run_dir}"]).build()
    described.load()
    return described


CPU = "--trainer.accelerator=cpu"  # where something is compared that runs on a CPU


class Bench:
    """One client with all it needs, warmed up by a round of task 1."""

    def __init__(self, *words: str) -> None:
        described = experiment([*CIFAR, *scale.federation, *words], "unused")  # rounds alone write nothing
        self.template = described.template()
        self.worker = Worker(self.template)
        self.client = self.worker.restore(0, None, self.template.start_message(0))
        self.client.begin_round(Round(1, 1, True, 0))
        self.fit()
        self.number = 1

    def fit(self, *callbacks: Callback) -> None:
        """The fit of the round that the client has begun."""
        trainer = self.template.trainer(None)
        trainer.callbacks.extend(callbacks)  # type: ignore[attr-defined]
        trainer.fit(self.client)

    def begin(self) -> None:
        """Begin one more round of task 2."""
        self.number += 1
        self.client.begin_round(Round(2, self.number, False, 0))

    def round(self) -> None:
        """A round of task 2 as it is in a federation, with its evaluation."""
        self.begin()
        self.fit()
        self.worker.evaluate(self.client, 2)

    @property
    def trained_images(self) -> int:
        """Images that went through the steps of the last round."""
        return sum(len(samples) for _, samples in self.client.plan)


def timed(*runs: Callable[[], object]) -> list[float]:
    """Median seconds of each, taken in turn after a round to warm up."""
    taken: list[list[float]] = [[] for _ in runs]
    for number in range(scale.warmup + scale.repeat):
        for run, seconds in zip(runs, taken, strict=True):
            start = time.perf_counter()
            run()
            if number >= scale.warmup:
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in taken]


def flops(run: Callable[[], object]) -> int:
    """Floating-point operations of matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def matmul_flops(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a large matrix product, the best of several."""
    size = 8192 if device == "cuda" else scale.product
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        (a @ b).flatten()[0].item()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


# ---------------------------------------------------------------------------------------------------- the parts


def prefix() -> Iterator[Row]:
    """Blocks 0 to b - 1 computed once for each image."""
    models = {"ViT-Tiny/16, 160 px": [], "ViT-Small/16, 160 px": ["--backbone.name=vit_small_patch16_224"]}
    for (name, words), block in itertools.product(itertools.islice(models.items(), scale.models), (3, 11)):
        without, cached = (Bench(*words, f"--model.block={block}", f"--backbone.cache_mib={mib}") for mib in (0, 4096))
        start = time.perf_counter()
        cached.round()  # the images of task 2 and all test images are new to it
        first = time.perf_counter() - start
        seconds = timed(without.round, cached.round)
        counts = flops(without.round), flops(cached.round)
        yield {
            "ViT": name,
            "block": block,
            "s/round without": seconds[0],
            "s/round cached": seconds[1],
            "s its first round": first,
            "times faster": seconds[0] / seconds[1],
            "GFLOP without": counts[0] / 1e9,
            "GFLOP cached": counts[1] / 1e9,
            "FLOP ratio": counts[0] / counts[1],
        }


def now() -> float:
    """Seconds, once the accelerator has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class PhaseTimes(Callback):
    """Seconds of every step, by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self.start = now()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop it."""
        self.seconds[batch.phase].append(now() - self.start)


def replay() -> Iterator[Row]:
    """Steps of both phases with the same number of images, in the same rounds."""
    for precision in ("32-true", "bf16-mixed"):
        bench, times = Bench(CPU, f"--trainer.precision={precision}"), PhaseTimes()
        for number in range(2 * scale.repeat):
            bench.begin()
            sizes = {phase: {len(s) for p, s in bench.client.plan if p == phase} for phase, _ in bench.client.plan}
            bench.fit(*([times] if number else []))
        collaborate, again = (statistics.median(times.seconds[phase]) for phase in ("collaborate", "replay"))
        yield {
            "precision": precision,
            "images a step": "/".join(str(sorted(sizes[phase])) for phase in sizes),
            "ms collaborate": 1e3 * collaborate,
            "ms replay": 1e3 * again,
            "ratio": again / collaborate,
        }


def plain_round(client: Client) -> None:
    """The steps of a round as one would write them down: float32, the whole ViT in each step, torch's defaults."""
    assert isinstance(client, FedLSCL)
    optimizer = torch.optim.Adam(client.parameters(), lr=client.learning_rate)
    client.train()
    for batch in client.train_dataloader():
        generated = client.generate(batch.images.pixels)
        tokens = client.vit.lower(client.vit.prepare(batch.images.pixels), client.block)
        lora = LowRank(client.block, client.generator.split(generated["weights"]), scale=client.scale)
        logits = client.head(client.vit.upper(tokens, client.block, [lora]))
        loss = F.cross_entropy(logits.masked_fill(~client.seen_mask, -torch.inf), batch.images.labels)
        if batch.phase == "replay":
            for name, weight in (("features", 0.1), ("weights", 0.01)):
                distances = (generated[name] - batch.snapshot[name]).square().sum(dim=1)
                loss = loss + weight * (distances * batch.observed).sum() / batch.observed.sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def throughput() -> Iterator[Row]:
    """Training images a second in the steps of a round, without the selection of samples after it."""
    plain = Bench(CPU)
    for block in plain.client.vit.vit.blocks:
        block.attn.fused_attn = True  # as timm makes it
    plain.begin()
    plain.fit()  # takes the snapshot, which the plain round does not
    engines = {p: Bench(CPU, f"--trainer.precision={p}") for p in ("32-true", "bf16-mixed")}

    def plainly(mixed: bool) -> None:
        plain.begin()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            plain_round(plain.client)

    def with_trainer(bench: Bench) -> None:
        bench.begin()
        bench.client.on_train_end = lambda: None  # type: ignore[method-assign]  # the plain round selects nothing
        bench.fit()

    runs: dict[str, Callable[[], None]] = {
        "plain, 32-true": partial(plainly, False),
        "plain, bf16-mixed": partial(plainly, True),
        **{f"fedlscl, {precision}": partial(with_trainer, bench) for precision, bench in engines.items()},
    }
    seconds = dict(zip(runs, timed(*runs.values()), strict=True))
    for name, taken in seconds.items():
        yield {
            "engine": name,
            "images/s": plain.trained_images / taken,
            "times plain": seconds["plain, 32-true"] / taken,
        }


def hardware() -> Iterator[Row]:
    """A client's training steps, without evaluation."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {"ViT-Tiny/16, 160 px": [], "ViT-Small/16, 224 px": ["--backbone.name=vit_small_patch16_224"]}
    sizes["ViT-Small/16, 224 px"] += ["--backbone.image_size=224", "--cnn.image_size=64"]
    if device == "cuda":
        sizes["ViT-Giant/14, 224 px"] = ["--backbone.name=vit_giant_patch14_224", "--cnn.image_size=224"]
        sizes["ViT-Giant/14, 224 px"] += ["--backbone.image_size=224", "--model.batch_size=128"]
    shown = itertools.islice(sizes.items(), scale.models)
    for (name, words), precision in itertools.product(shown, ("32-true", "bf16-mixed")):
        peak = matmul_flops(torch.float32 if precision == "32-true" else torch.bfloat16, device)
        bench, times = Bench(*words, f"--trainer.precision={precision}"), PhaseTimes()
        for _ in range(scale.repeat):
            times.seconds.clear()
            bench.begin()
            bench.fit(times)
        seconds = sum(map(sum, times.seconds.values()))
        bench.begin()
        bench.client.on_train_end = lambda: None  # type: ignore[method-assign]
        count = flops(bench.fit)
        yield {
            "ViT": name,
            "precision": precision,
            "ms a step": 1e3 * seconds / len(bench.client.plan),
            "GFLOP/s": count / seconds / 1e9,
            "GFLOP/s of a product": peak / 1e9,
            "share": count / seconds / peak,
        }


def in_memory(described: Experiment) -> list[Client]:
    """All clients as objects of their own, with one cache."""
    clients: list[Client] = []
    for index in range(len(described.data.split.clients)):
        template = described.template()
        client = Worker(template).restore(index, None, template.start_message(index))
        client.trainer = RoundTrainer("cpu")  # for its precision alone
        clients.append(client)
        client.precomputed = clients[0].precomputed
    return clients


def bare(described: Experiment, clients: list[Client]) -> dict[str, list[list[float]]]:
    """The whole federation as a bare loop: models in memory, no Trainer, messages, files, tracking or progress.

    Returns:
        The accuracies after the last round, by mask, client and task.
    """
    seed, server = described.seed, described.server
    assert isinstance(server, ExactO2D)
    accuracy: dict[str, list[list[float]]] = {}
    for round in described.schedule.after(0, described.data.split.spec.tasks, seed):
        sent = {}
        for client in clients:
            client.begin_round(round)
            with seeds.seeded(seed, "fit", client.index, round.number):
                optimizer = client.configure_optimizers()
                client.on_train_start()
                for batch in client.train_dataloader():
                    losses = client.collaborative_losses if batch.phase == "collaborate" else client.replay_losses
                    frozen = client.precomputed("train", batch.images.indices, torch.device("cpu"))
                    loss = torch.stack(list(losses(client(batch.images.pixels, frozen), batch).values())).sum()
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                client.on_train_end()
            tensors = {key: tensor.detach().clone() for key, tensor in client.outgoing().items()}
            sent[client.index] = distillation.Generator(**tensors)
        everyone = distillation.total(sent.values())
        accuracy = {mask: [] for mask in MASKS}
        for client in clients:
            own = sent[client.index]
            moments = distillation.second_moments(own.features)
            answer = distillation.Student(own.weight, own.bias, moments, everyone, server.strength).exact()
            with torch.no_grad():
                for tensor, value in zip(client.shared().values(), answer, strict=True):
                    tensor.copy_(value)
            client.begin_evaluation(round.task)
            client.on_test_start()
            with torch.inference_mode():
                for images in client.test_dataloader():
                    client.test_step(images, 0)
            for mask, values in client.accuracy.compute().items():
                accuracy[mask].append(values)
    return accuracy


def framework() -> Iterator[Row]:
    """The command with tracking and files, beside the bare loop; imports are common to both and not counted."""
    threads = torch.get_num_threads()
    settings = {"CIFAR": [*CIFAR, CPU, "--federation.rounds=2"], "quickstart": [*DIGITS, CPU]}
    for setting, words in itertools.islice(settings.items(), scale.models):
        yield compare(setting, words)
        torch.set_num_threads(threads)  # the quickstart has set its own


def compare(setting: str, words: list[str]) -> Row:
    """One setting, three times each way."""
    words = [*words, *scale.federation]
    accuracies: dict[str, Any] = {}
    numbers = itertools.count()
    with tempfile.TemporaryDirectory() as folder:

        def command() -> None:
            run_dir = f"{folder}/{next(numbers)}"
            main(["fit", *words, *scale.words, f"--run_dir={run_dir}"])
            matrix = json.loads(Path(run_dir, "summary.json").read_text())["accuracy"]["seen"]["matrix"]
            accuracies["command"] = [by_client[-1] for by_client in matrix]

        taken: dict[str, list[float]] = {"command": [], "loop": []}
        for _ in range(scale.warmup + scale.repeat):
            start = time.perf_counter()
            command()
            taken["command"].append(time.perf_counter() - start)
            described = experiment(words, f"{folder}/{next(numbers)}")
            clients = in_memory(described)
            start = time.perf_counter()
            accuracies["loop"] = bare(described, clients)["seen"]
            taken["loop"].append(time.perf_counter() - start)
        seconds = [statistics.median(values[scale.warmup :]) for values in taken.values()]
    return {
        "setting": setting,
        "s fedlscl fit": seconds[0],
        "s bare loop": seconds[1],
        "ratio": seconds[0] / seconds[1],
        "same accuracies": accuracies["command"] == accuracies["loop"],
    }


def uploads_on_disk(clients: int, folder: Path) -> Received:
    """Uploads of generators and features of unit length, as a server receives them."""
    received = Received()
    schema = {
        "weight": TensorSpec((scale.outputs, scale.width)),
        "bias": TensorSpec((scale.outputs,)),
        "features": TensorSpec((scale.features, scale.width)),
    }
    rng = torch.Generator().manual_seed(0)
    for index in range(clients):
        tensors = {name: torch.randn(*spec.shape, generator=rng) for name, spec in schema.items()}  # type: ignore[arg-type]
        tensors["weight"] *= 0.02
        tensors["features"] = F.normalize(tensors["features"] + 2 * torch.randn(scale.width, generator=rng), dim=1)
        file = folder / f"{index}.safetensors"
        message = Upload(index, 1, 1, 1, tensors).to_bytes()
        file.write_bytes(message)
        received.add(Upload.from_bytes(message, schema), file)
    return received


def answer_all(server: ExactO2D | IterativeO2D, received: Received) -> tuple[float, dict[str, float]]:
    """Seconds for the answers to all clients, and the mean of their metrics."""
    start = time.perf_counter()
    answers, _ = server.aggregate(received, Context(len(received), Round(1, 1, True, 0), RoundTrainer))
    metrics = [answers[index].metrics for index in received]
    seconds = time.perf_counter() - start
    return seconds, {name: statistics.fmean(one[name] for one in metrics) for name in metrics[0]}


def distil(clients: int, threads: int) -> Row:
    """One size of federation, in a process of its own."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        received = uploads_on_disk(clients, Path(folder))
        runs = [answer_all(ExactO2D(), received)[0] for _ in range(1 + max(1, 50 // clients))]
    return {"clients": clients, "ms per client": 1e3 * statistics.median(runs[1:]) / clients, "peak MiB": peak_mib()}


def distillation_() -> Iterator[Row]:
    """Width 512, 3072 outputs, 800 features for each client."""
    with tempfile.TemporaryDirectory() as folder:
        received = uploads_on_disk(5, Path(folder))
        for server in (ExactO2D(), IterativeO2D(epochs=1)):  # to warm up
            answer_all(server, received)
        found = {"exact": answer_all(ExactO2D(), received), "iterative": answer_all(IterativeO2D(), received)}
        for name, (seconds, metrics) in found.items():
            yield {
                "O2D": name,
                "s for 5 clients": seconds,
                "times faster": found["iterative"][0] / seconds,
                "objective before": metrics["objective_before"],
                "after": metrics["objective_after"],
            }
    for clients in scale.clients:
        yield in_a_process(distil, clients, torch.get_num_threads())


def federate(clients: int, threads: int) -> Row:
    """A federation of small clients, in a process of its own."""
    torch.set_num_threads(threads)
    words = [
        *DIGITS,
        *("--data.source=bench.Noise", "--data.source.classes=2", f"--data.source.train={8 * clients + 8}"),
        *("--data.source.size=8", "--data.source.test=8", "--data.split.min_public_images=8"),
        *("--data.split.private_classes=0", "--data.split.public_classes=2", "--data.split.tasks=1"),
        *(f"--data.split.clients={clients}", "--tracking.wandb_mode=disabled", "--federation.rounds=3"),
        f"--threads={threads}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        federation = experiment(words, folder).federation()
        started = time.perf_counter() - start
        seconds = []
        start = time.perf_counter()
        for _ in federation.run():
            seconds.append((time.perf_counter() - start) / clients)
            start = time.perf_counter()
    return {
        "clients": clients,
        "s start-up": started,
        "ms per client-round": 1e3 * statistics.median(seconds),
        "peak MiB": peak_mib(),
    }


def clients() -> Iterator[Row]:
    """8 images of each of 2 classes; 3 rounds with their commits."""
    for count in scale.clients:
        yield in_a_process(federate, count, torch.get_num_threads())


class StepMarks(Callback):
    """Marks every training step in a profile."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A step begins."""
        self.mark = ExitStack()
        self.mark.enter_context(record_function("step"))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """It ends."""
        self.mark.close()


WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "cudaStreamSynchronize", "cudaDeviceSynchronize")


def ancestors(event: Any) -> set[str]:
    """The names of all operations that an operation of a profile is part of."""
    names = set()
    while event.cpu_parent is not None:
        event = event.cpu_parent
        names.add(event.name)
    return names


def device() -> Iterator[Row]:
    """The second round of all clients; the smallest models, since numbers of operations do not depend on the size."""
    for precision in itertools.islice(("bf16-mixed", "32-true"), scale.models):
        with tempfile.TemporaryDirectory() as folder:
            words = [
                *CIFAR,
                *TINY.words,
                *scale.federation,
                "--federation.rounds=2",
                f"--trainer.precision={precision}",
            ]
            yield {"precision": precision, **profiled(experiment(words, folder))}


def profiled(described: Experiment) -> Row:
    """What the second round of an experiment does to the frozen model, and where its steps wait."""

    def trainer(logger: Logger | None) -> Trainer:
        made = described.trainer(logger)
        made.callbacks.append(StepMarks())  # type: ignore[attr-defined]
        return made

    federation = replace(described, trainer=trainer).federation()
    rounds = federation.run()
    next(rounds)
    vit = federation.template.vit
    places = [tensor.data_ptr() for tensor in vit.state_dict().values()]
    with mock.patch.object(vit, "_apply", wraps=vit._apply) as moves, profile(record_shapes=True) as recorded:
        next(rounds)
    events = recorded.events() or []
    own = {tuple(tensor.shape) for body in federation.template.models.values() for tensor in body.state_dict().values()}
    frozen = {tuple(tensor.shape) for tensor in vit.state_dict().values()} - own
    # the fused Adam of CPUs reads its counters, which on a GPU stay there
    waits = [above for e in events if e.name in WAITS and "aten::_fused_adam_" not in (above := ancestors(e))]
    return {
        "fits and tests": 2 * federation.clients,
        "steps": sum(e.name == "step" for e in events),
        "moves of the ViT": moves.call_count,
        "tensors of it elsewhere": sum(
            a != t.data_ptr() for a, t in zip(places, vit.state_dict().values(), strict=True)
        ),
        "copies of its weights": sum(e.name == "aten::copy_" and tuple(e.input_shapes[0]) in frozen for e in events),
        "waits in steps": sum("step" in above for above in waits),
    }


def in_a_process(run: Callable[..., Row], *args: int) -> Row:
    """The result of `run` in a fresh process, so that its peak of memory is its own."""
    if scale is TINY:
        return run(*args)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(run, args)


def peak_mib() -> float:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux the other figure may be that of the process that started this one
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# --------------------------------------------------------------------------------------------------------- output


def cell(value: object) -> str:
    """Three digits that count."""
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else (f"{value:.0f}" if isinstance(value, float) else str(value))
    )


def table(rows: list[Row]) -> str:
    """Rows as Markdown; a new header where the columns change."""
    lines = []
    for columns, group in itertools.groupby(rows, key=lambda row: list(row)):
        lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        lines += ["| " + " | ".join(cell(row[c]) for c in columns) + " |" for row in group] + [""]
    return "\n".join(lines)


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "prefix": prefix,
    "replay": replay,
    "throughput": throughput,
    "hardware": hardware,
    "framework": framework,
    "distillation": distillation_,
    "clients": clients,
    "device": device,
}


def run(words: list[str] | None = None) -> None:
    """Run the parts that are asked for."""
    global scale
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"all by default, or of {', '.join(PARTS)}")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--tiny", action="store_true", help="everything as small as it can be, to see that it runs")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    options = parser.parse_args(words)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; parts: {', '.join(PARTS)}")
    scale = TINY if options.tiny else Scale()
    sys.argv[1:] = []  # what follows gives its own command lines
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{options.threads} threads"
    machine = f"{platform.system()} {platform.machine()}, {device}, torch {torch.__version__}"
    print(machine + "\n")
    results: dict[str, list[Row]] = {}
    for name in options.parts or PARTS:
        torch.set_num_threads(options.threads)
        results[name] = list(PARTS[name]())
        print(f"{name}: {PARTS[name].__doc__}\n\n{table(results[name])}", flush=True)
        if options.json:
            options.json.write_text(json.dumps({"machine": machine, **results}, indent=1))


if __name__ == "__main__":
    run()
