"""Accuracy over epsilon of heads in closed form from sums with noise.

    python experiments/privacy.py SETTING.yaml --epsilons 1 2 4 8 inf --seeds 42 1999 2024 [-- fields of `fedlscl fit`]

For each seed all runs are done in this process, one after another, with the frozen model's features computed once. Sums
are secure and each task has one round; noise comes from the runs' seeds, so that the numbers can be repeated. `inf` is
the same method without noise, with all that only noise requires left out. Rows are of JSON; at the end there is a table
of final averages in %, mean and sample deviation over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from fedlscl.federation.callback import RoundResult
from fedlscl.federation.transport import InProcess
from fedlscl.models.cache import FrozenCache
from fedlscl.run.configuration import Configuration

HERE = Path(__file__).resolve().parent
MASKS = ("task", "seen", "none")


def runs(setting: Path, methods: list[str], epsilons: list[float], seed: int, fields: list[str]) -> Iterator[str]:
    """One line for each run of a seed."""
    features: FrozenCache | None = None
    for method in methods:
        for epsilon in epsilons:
            words = ["--config", str(setting), "--config", str(HERE / "methods" / f"{method}.yaml")]
            words += ["--federation.secure", "true", "--federation.rounds", "1"]
            words += ["--seed_everything", str(seed), *fields]
            if epsilon < math.inf:
                words += ["--model.privacy.epsilon", str(epsilon), "--model.privacy.noise", "seed"]
            with tempfile.TemporaryDirectory() as folder:
                result, features = ended([*words, "--run_dir", folder], features)
            found = {mask: round(result.mean(mask), 2) for mask in MASKS}
            yield json.dumps({"method": method, "epsilon": epsilon, "seed": seed, **found, "server": result.server})


def ended(words: list[str], features: FrozenCache | None) -> tuple[RoundResult, FrozenCache]:
    """The last round of a run in this process, and the frozen features, which another run may have computed."""
    experiment = Configuration(words).build()
    experiment.load()
    federation = experiment.federation()
    assert isinstance(federation.transport, InProcess)
    features = features or federation.transport.worker.precomputed
    federation.transport.worker.precomputed = features
    return [*federation.run()][-1], features


def main() -> None:
    """Run, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", type=Path)
    parser.add_argument("--methods", nargs="+", default=["fedncm", "fed_ridge"])
    parser.add_argument("--epsilons", nargs="+", type=float, default=[1, 2, 4, 8, math.inf])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 1999, 2024])
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    given, fields = parser.parse_args(words[:end]), words[end + 1 :]
    found: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for seed in given.seeds:
        for line in runs(given.setting, given.methods, given.epsilons, seed, fields):
            print(line, flush=True)
            row = json.loads(line)
            for mask in MASKS:
                found[row["method"], mask][row["epsilon"]].append(row[mask])
    print(f"| method | mask | {' | '.join(f'{epsilon:g}' for epsilon in given.epsilons)} |")
    print("| --- " * (2 + len(given.epsilons)) + "|")
    for (method, mask), by_epsilon in found.items():
        print(f"| {method} | {mask} | {' | '.join(map(cell, by_epsilon.values()))} |")


def cell(values: list[float]) -> str:
    """Mean and deviation; of a single value none."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


if __name__ == "__main__":
    main()
