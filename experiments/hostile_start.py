"""A server whose first message keeps each client's CNN as it was drawn, so that it can read the features of Fed-LSCL.

    python experiments/hostile_start.py FOLDER --seeds 42 1999 2024 [--method fed_lscl] [-- fields of `fedlscl fit`]
    fedlscl audit FOLDER/* --out AUDIT

All clients start with the generator phi that the server sends. Where that is zero, A and B of every LoRA pair are zero:
the gradient of each is a product with the other, and what reaches the CNN is one with phi's weights, so that neither
phi nor the CNN moves in any step, by Adam exactly. The one-by-one distillation of zeros is zero. What the features that
a client uploads are of is then the CNN before its first step, which follows from the run's seed. All else is as
published: runs of the digits, one for each seed in FOLDER, whose received messages `fedlscl audit` attacks.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

import torch
from rich.console import Console

from fedlscl.federation.template import Template
from fedlscl.run.configuration import Configuration
from fedlscl.run.experiment import Experiment

HERE = Path(__file__).resolve().parent


class Hostile(Experiment):
    """An experiment whose server sends zeros for the common start."""

    def template(self) -> Template:
        """The same clients with another start."""
        template = super().template()
        template.common_start = {name: torch.zeros_like(tensor) for name, tensor in template.common_start.items()}
        return template


def run(folder: Path, method: str, seed: int, words: list[str]) -> Experiment:
    """Run a method on the digits from a start of zeros."""
    given = ["--config", str(HERE / "digits.yaml"), "--config", str(HERE / "methods" / f"{method}.yaml")]
    given += ["--data.split.train_per_class", "70", "--seed_everything", str(seed), "--run_dir", str(folder)]
    given += ["--tracking.received", "true", "--tracking.wandb_mode", "disabled", *words]
    honest = Configuration(given).build()
    hostile = Hostile(**{field.name: getattr(honest, field.name) for field in fields(honest)})
    hostile.load()
    hostile.run(Console(quiet=True))
    return hostile


def main() -> None:
    """Run, and print accuracies, by which a client could notice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 1999, 2024])
    parser.add_argument("--method", default="fed_lscl", help="or fed_lscl_sums")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    given, more = parser.parse_args(words[:end]), words[end + 1 :]
    for seed in given.seeds:
        hostile = run(given.folder / f"{given.method}-{seed}", given.method, seed, more)
        print(f"{hostile.run_dir}: finished", flush=True)


if __name__ == "__main__":
    main()
