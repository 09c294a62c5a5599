"""Measure the engine on an NVIDIA GPU, and run the paper's experiment at its size there.

python experiments/gpu.py [PART ...] [--minutes M] [--out FOLDER] [--jobs N] [--seeds N ...] [--methods NAME ...]
                          [--images FOLDER --weights FILE] [--tiny]

speed    images a second in the steps of a client, recorded and not, with ViT-Tiny, -Small and -Base; whether the states
         after them are equal to the last bit; the share of a large matrix product
profile  kernels of a recorded step, read off torch's profiler
round    a round of five clients, with all that belongs to it
methods  whether the states of all clients of a small federation are, recorded and not, with every kind of client
runs     experiments/cifar100.yaml with all images, 5 rounds of 5 epochs each; needs --images and --weights

Each part prints a table and writes it to FOLDER/PART.json. Images of all others are noise and the ViTs untrained,
which changes no time. `runs` goes on where an earlier call with the same --out has stopped; it stops when --minutes are
over, counted from the start of the command, and copies the summaries of finished runs to FOLDER/summaries.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from unittest import mock

import bench
import torch
from bench import CIFAR, HERE, TINY, Bench, Row, experiment, flops, matmul_flops, now
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from fedlscl.client import Client
from fedlscl.federation import captured, trainer
from fedlscl.federation.algorithm import Federation
from fedlscl.federation.store import client_name

START = time.monotonic()
PAPER = [
    *("--backbone.image_size=224", "--cnn.image_size=224", "--cnn.model_args={}", "--model.epochs=10"),
    *("--data.source.train=40", "--data.split.train_per_class=40", "--model.buffer_size=20"),
    "--model.continual.init_args.passes=2",
]
"""What a client of the paper's setting trains on, in fewer images."""

VITS = {"ViT-Tiny/16": "vit_tiny_patch16_224", "ViT-Small/16": "vit_small_patch16_224"}
VITS["ViT-Base/16"] = "vit_base_patch16_224"
FIRST = ("fed_lscl", "fed_lscl_without_o2d", "local_vit", "fed_ridge", "joint_vit")
State = dict[str, Tensor]
DRAW = Client.draw_plan


class Clock(Callback):
    """Time of the steps of a fit's first phase, but for those in which is made whatever is made once."""

    def __init__(self) -> None:
        self.skipped = 2 if bench.scale is TINY else 20
        self.images = self.steps = 0
        self.seconds = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start, count, and stop, once all is done that a device was given."""
        if batch_idx == self.skipped:
            self.phase, self.start = batch.phase, now()
        if batch_idx >= self.skipped and not self.seconds:
            if batch.phase != self.phase:
                self.seconds = now() - self.start
            else:
                self.images, self.steps = self.images + len(batch.images.labels), self.steps + 1


def same(one: State, other: State) -> bool:
    """Whether two states are equal to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def trained(vit: str, precision: str, capture: bool) -> tuple[Bench, Clock, State]:
    """A client that has had a round of each of two tasks, the clock of the second, and its state after it."""
    words = ["--model.epochs=4"] if bench.scale is TINY else [*PAPER, f"--backbone.name={VITS[vit]}"]
    made, clock = Bench(*words, f"--trainer.precision={precision}", f"--trainer.capture={capture}"), Clock()
    made.begin()
    made.fit(clock)
    return made, clock, {name: tensor.clone() for name, tensor in made.client.state().items()}


def speed() -> Iterator[Row]:
    """One after the other."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = [("ViT-Tiny/16", "bf16-mixed"), ("ViT-Base/16", "bf16-mixed"), ("ViT-Tiny/16", "32-true")]
    cases += [("ViT-Small/16", "bf16-mixed")]
    for vit, precision in itertools.islice(cases, bench.scale.models):
        eager, before, wanted = trained(vit, precision, capture=False)
        _, after, found = trained(vit, precision, capture=True)
        peak = matmul_flops(torch.float32 if precision == "32-true" else torch.bfloat16, device)
        eager.begin()
        steps, eager.client.plan = len(eager.client.plan), eager.client.plan[:2]
        eager.client.on_train_end = lambda: None  # type: ignore[method-assign]
        rates = [clock.images / clock.seconds for clock in (before, after)]
        rate = flops(eager.fit) / sum(len(samples) for _, samples in eager.client.plan) * rates[1]
        yield {
            "ViT": vit,
            "precision": precision,
            "images/s eager": rates[0],
            "images/s recorded": rates[1],
            "times faster": rates[1] / rates[0],
            "ms a step": 1e3 * after.seconds / after.steps,
            "TFLOP/s": rate / 1e12,
            "TFLOP/s of a product": peak / 1e12,
            "share": rate / peak,
            "steps": steps,
            "equal states after them": same(wanted, found),
        }


class Profiled(Callback):
    """Profiles some steps of a fit's first phase."""

    def __init__(self) -> None:
        self.first, self.last = (2, 4) if bench.scale is TINY else (25, 55)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start before the first of them, stop before the one behind the last."""
        if batch_idx == self.first:
            now()
            self.profile = torch.profiler.profile()
            self.profile.start()
            self.start = now()
        if batch_idx == self.last:
            self.seconds = now() - self.start
            self.profile.stop()


def profile() -> Iterator[Row]:
    """Kernels of a recorded step, and for how much of it one of them runs."""
    for vit in itertools.islice(("ViT-Tiny/16", "ViT-Base/16"), bench.scale.models):
        words = [] if bench.scale is TINY else [*PAPER, f"--backbone.name={VITS[vit]}"]
        made, recorded = Bench(*words, "--model.epochs=12", "--trainer.precision=bf16-mixed"), Profiled()
        made.begin()
        made.fit(recorded)
        everything: Any = recorded.profile.events()  # type: ignore[no-untyped-call]
        events = [event for event in everything if event.device_type.name == "CUDA"]
        steps = recorded.last - recorded.first
        yield {
            "ViT": vit,
            "kernels a step": len(events) / steps,
            "ms of kernels": sum(event.device_time for event in events) / steps / 1e3,
            "ms a step": 1e3 * recorded.seconds / steps,
        }


def round_() -> Iterator[Row]:
    """The second task's round."""
    for vit in itertools.islice(("ViT-Tiny/16", "ViT-Base/16"), bench.scale.models):
        tiny = bench.scale is TINY
        words = [*TINY.words, *TINY.federation] if tiny else [*PAPER, f"--backbone.name={VITS[vit]}"]
        words += ["--trainer.precision=bf16-mixed", *([] if tiny else ["--model.epochs=30"])]
        drawn: list[int] = []  # images that a client goes over in a round

        def count(client: Client, drawn: list[int] = drawn) -> None:
            DRAW(client)
            drawn.append(sum(len(samples) for _, samples in client.plan))

        with tempfile.TemporaryDirectory() as folder, mock.patch.object(Client, "draw_plan", count):
            federation = experiment([*CIFAR, *words], folder).federation()
            *_, result = federation.run()
        images = sum(drawn[federation.clients :])
        yield {
            "ViT": vit,
            "images": images,
            **{f"s {phase}": result.seconds[phase] for phase in ("fit", "aggregate", "download", "evaluate")},
            "images/s of the fits": images / result.seconds["fit"],
            "GiB": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0,
        }


def states_of(federation: Federation) -> list[State]:
    """Of all clients."""
    found = [federation.store.read(client_name(index)) for index in range(federation.clients)]
    return [{name: tensor.clone() for name, tensor in (state or {}).items()} for state in found]


def kinds_of_clients() -> list[str]:
    """A method for each class of clients."""
    found: dict[str, str] = {}
    for path in sorted((HERE / "methods").glob("*.yaml")):
        text = path.read_text()
        found.setdefault(text.partition("class_path:")[2].split()[0], path.stem)
    return list(found.values())


def states(method: str, capture: bool) -> tuple[list[State], int, list[str]]:
    """Of all clients after a small federation; how many steps were recorded, and what was said of others."""
    recorded, told = 0, list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    captured.log.addHandler(handler)

    def count(step: Any) -> captured.Replay:
        nonlocal recorded
        replay = captured.cuda_graph(step)
        recorded += 1
        return replay

    federation_ = [word for word in TINY.federation if "batch_size" not in word and "train_per_class" not in word]
    size = [*TINY.words, *federation_, "--data.split.train_per_class=20", "--federation.rounds=2"]
    words = [*CIFAR, f"--config={HERE / 'methods' / method}.yaml", *size, f"--trainer.capture={capture}"]
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(trainer, "cuda_graph", count):
        federation = experiment(words, folder).federation()
        list(federation.run())
        found = states_of(federation)
    captured.log.removeHandler(handler)
    return found, recorded, told


def one_method(method: str) -> Row:
    """With and without."""
    captured.WORTH = 0
    try:
        wanted, found = states(method, capture=False), states(method, capture=True)
    except (Exception, SystemExit) as error:  # so that one that cannot run does not keep the others from being seen
        return {"method": method, "recorded steps": 0, "equal states": False, "why not": f"{error!r:.200}"}
    equal = all(same(one, other) for one, other in zip(wanted[0], found[0], strict=True))
    return {"method": method, "recorded steps": found[1], "equal states": equal, "why not": "; ".join(set(found[2]))}


def methods() -> Iterator[Row]:
    """Each in one of several processes."""
    names = kinds_of_clients()[: bench.scale.models]
    with multiprocessing.get_context("spawn").Pool(1 if bench.scale is TINY else 8) as pool:
        yield from pool.imap_unordered(one_method, names)


class Runs:
    """Full-size runs, some at a time, until the time is over."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.out / "runs"

    def words(self, method: str, seed: int) -> list[str]:
        """The command line of a run."""
        source = ["ImageFolder", f"--data.source.root={self.options.images}"]
        source += ["--data.source.size=32", "--data.source.name=cifar100"]
        small = ["--data.split.train_per_class=5", "--data.split.test_per_class=2", *TINY.words]
        return [
            *("fit", f"--config={HERE / 'cifar100.yaml'}", f"--config={HERE / 'methods' / method}.yaml"),
            *("--data.source", *source, f"--seed_everything={seed}", "--trainer.precision=bf16-mixed"),
            f"--backbone.name={self.options.vit}",
            *(
                [f"--backbone.weights={self.options.weights}"]
                if self.options.weights
                else ["--backbone.pretrained=false"]
            ),
            *("--model.evaluation_batch_size=512", "--backbone.cache_mib=40000", "--threads=2"),
            *(small if bench.scale is TINY else []),
            f"--run_dir={self.folder / f'{method}-{seed}'}",
        ]

    def __call__(self) -> Iterator[Row]:
        """In the order of seeds, then methods."""
        waiting = [(m, seed) for seed in self.options.seeds for m in self.options.methods]
        running: dict[tuple[str, int], tuple[subprocess.Popen[bytes], float]] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        experiment(self.words(*waiting[0])[1:-1], "unused")  # decodes the images, once for all
        try:
            while (waiting or running) and self.left > 0:
                while waiting and len(running) < self.options.jobs:
                    run = waiting.pop(0)
                    with (self.folder / f"{run[0]}-{run[1]}.log").open("ab") as log:
                        command = [sys.executable, "-c", "from fedlscl.cli import main; main()", *self.words(*run)]
                        process = subprocess.Popen(command, stdout=log, stderr=log)
                    running[run] = process, time.monotonic()
                time.sleep(0.2)
                for run in [run for run, (process, _) in running.items() if process.poll() is not None]:
                    yield self.row(*run, time.monotonic() - running.pop(run)[1])
        finally:
            for process, _ in running.values():
                process.kill()  # it keeps its complete rounds
                process.wait()
        yield from (self.row(*run, time.monotonic() - start) for run, (_, start) in running.items())

    @property
    def left(self) -> float:
        """Seconds."""
        return float(60 * self.options.minutes - (time.monotonic() - START))

    def row(self, method: str, seed: int, seconds: float) -> Row:
        """How far a run is, and its accuracy."""
        run = self.folder / f"{method}-{seed}"
        metrics, summary = run / "metrics.csv", run / "summary.json"
        rounds = len(metrics.read_text().splitlines()) - 1 if metrics.exists() else 0
        found: Row = {"method": method, "seed": seed, "s": seconds, "lines of metrics.csv": rounds, "finished": False}
        kept = self.options.out / "summaries"
        kept.mkdir(parents=True, exist_ok=True)
        if metrics.exists():
            shutil.copy(metrics, kept / f"{run.name}.csv")
        if summary.exists():
            shutil.copy(summary, kept / f"{run.name}.json")
            found |= {"finished": True, "seen": json.loads(summary.read_text())["accuracy"]["seen"]["final_average"]}
        return found


def run(words: list[str] | None = None) -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help="speed, profile, round, methods, runs; all but runs by default"
    )
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--jobs", type=int, default=2, help="how many runs at a time")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1999, 2024])
    parser.add_argument("--methods", nargs="+", default=list(FIRST))
    parser.add_argument("--vit", default="vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    parser.add_argument("--images", type=Path, help="CIFAR-100 as a folder: train/CLASS/*, test/CLASS/*")
    parser.add_argument("--weights", type=Path, help="of the ViT, as safetensors; untrained without")
    parser.add_argument("--tiny", action="store_true", help="everything as small as it can be, to see that it runs")
    options = parser.parse_args(words)
    parts = {"speed": speed, "profile": profile, "round": round_, "methods": methods, "runs": Runs(options)}
    if unknown := set(options.parts) - set(parts):
        parser.error(f"no part {', '.join(sorted(unknown))}; parts: {', '.join(parts)}")
    if "runs" in options.parts and options.images is None:
        parser.error("runs needs --images")
    if not torch.cuda.is_available() and not options.tiny:
        parser.error("torch sees no NVIDIA GPU here; without one --tiny shows that the command works")
    bench.scale = TINY if options.tiny else bench.Scale()
    sys.argv[1:] = []  # what follows gives its own command lines
    options.out.mkdir(parents=True, exist_ok=True)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{machine}, torch {torch.__version__}\n", flush=True)
    for name in options.parts or ["speed", "profile", "round", "methods"]:
        rows: list[Row] = []
        for row in cast(Any, parts[name])():
            rows.append(row)
            print(row, flush=True)
            (options.out / f"{name}.json").write_text(json.dumps({"machine": machine, name: rows}, indent=1))
        print(f"\n{bench.table(rows)}", flush=True)


if __name__ == "__main__":
    run()
