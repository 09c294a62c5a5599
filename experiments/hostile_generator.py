"""A server whose messages keep each client's CNN as it was drawn, so that it can read the features of Fed-LSCL.

    python experiments/hostile_generator.py FOLDER --seeds 42 1999 2024 [--method fed_lscl] [--answers]
        [-- fields of `fedlscl fit`]
    fedlscl audit FOLDER/* --out AUDIT

All clients start with the generator phi that the server sends. Where that is zero, A and B of every LoRA pair are zero:
the gradient of each is a product with the other, and what reaches the CNN is one with phi's weights, so that neither
phi nor the CNN moves (one with batch normalisation does, in replay, since its statistics move). The one-by-one
distillation of zeros is zero. What the features that a client uploads are of is then the CNN before its first step,
which follows from the run's seed. With --answers the start is honest and each answer of `fed_lscl` zero, so that the
CNN moves in the first round alone. All else is as published: runs of the digits, one for each seed in FOLDER, whose
received messages `fedlscl audit` attacks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from fedlscl.federation.template import Template
from fedlscl.messages import Upload
from fedlscl.methods.fed_lscl import ExactO2D
from fedlscl.methods.o2d import Student
from fedlscl.run.configuration import Configuration
from fedlscl.run.experiment import Experiment
from fedlscl.server import Context

HERE = Path(__file__).resolve().parent


class HostileStart(Experiment):
    """An experiment whose server sends zeros for the common start."""

    def template(self) -> Template:
        """The same clients with another start."""
        template = super().template()
        template.common_start = {name: torch.zeros_like(tensor) for name, tensor in template.common_start.items()}
        return template


class HostileAnswers(ExactO2D):
    """A server that answers zeros."""

    def fuse(
        self, index: int, uploads: Mapping[int, Upload], student: Student, context: Context
    ) -> tuple[Tensor, Tensor]:
        """Whatever was sent."""
        own = uploads[index].tensors
        return torch.zeros_like(own["weight"]), torch.zeros_like(own["bias"])


def run(folder: Path, method: str, seed: int, answers: bool, words: list[str]) -> None:
    """Run a method on the digits under such a server."""
    given = ["--config", str(HERE / "digits.yaml"), "--config", str(HERE / "methods" / f"{method}.yaml")]
    given += ["--data.split.train_per_class", "70", "--seed_everything", str(seed), "--run_dir", str(folder)]
    given += ["--tracking.received", "true", "--tracking.wandb_mode", "disabled", *words]
    experiment = Configuration(given).build()
    if answers:
        experiment = replace(experiment, server=HostileAnswers())
    else:
        experiment = HostileStart(**{field.name: getattr(experiment, field.name) for field in fields(experiment)})
    experiment.load()
    summary = experiment.run(Console(quiet=True))
    print(f"{folder}: {summary.accuracy['seen'].final_average:.1f} % under `seen`", flush=True)


def main() -> None:
    """Run, and print accuracies, by which a client could notice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 1999, 2024])
    parser.add_argument("--method", choices=("fed_lscl", "fed_lscl_sums"), default="fed_lscl")
    parser.add_argument("--answers", action="store_true", help="zeros in all messages but the first, of fed_lscl")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    given, more = parser.parse_args(words[:end]), words[end + 1 :]
    for seed in given.seeds:
        run(given.folder / f"{given.method}-{seed}", given.method, seed, given.answers, more)


if __name__ == "__main__":
    main()
