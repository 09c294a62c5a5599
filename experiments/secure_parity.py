"""Whether secure sums change a number: methods with and without them, and with them on Flower; see `secure.py parity`.

A run that is finished is not done again: its folder bears the name that its configuration gives it.
"""

from __future__ import annotations

import io
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from deploy import Deployment
from same_numbers import states
from torch import Tensor

from fedlscl.cli import main as fedlscl
from fedlscl.run.configuration import Configuration

HERE = Path(__file__).resolve().parent
ENGINES = {"simulated": 1, "deployed": 0}
"""Of Flower, by the number of CPUs on which nodes are simulated; 0 for nodes that are processes of their own."""

EQUAL = ("accuracy", "bytes_up", "bytes_down", "skipped", "compute", "split_sha256")
"""What of a summary must be the same on all engines."""

HEAD = (
    *("method", "rounds", "bits", "seeds", "plain", "secure", "largest difference", "of", "states differ by"),
    *("bytes up, plain", "x secure", "other engines"),
)


class Case(NamedTuple):
    """What is run with and without secure sums."""

    method: str
    seed: int
    fields: tuple[str, ...]
    bits: int | None = None

    def words(self, secure: bool) -> list[str]:
        """Those behind `fedlscl fit`; the last of a field's words counts."""
        configs = [HERE / "digits.yaml", HERE / "methods" / f"{self.method}.yaml"]
        fixed = ["--threads=1", "--trainer.accelerator=cpu", "--tracking.wandb_mode=disabled"]
        words = [*(f"--config={path}" for path in configs), *fixed, *self.fields, f"--seed_everything={self.seed}"]
        if secure:
            words += ["--federation.secure=true"]
            words += [] if self.bits is None else [f"--federation.fraction_bits={self.bits}"]
        return words


def allowed() -> Iterator[str]:
    """All methods of `experiments/methods` whose server needs no more than sums."""
    for path in sorted((HERE / "methods").glob("*.yaml")):
        experiment = Configuration(Case(path.stem, 42, ()).words(secure=False)).build()
        experiment.load()
        template = experiment.template()
        template.begin()  # what a server needs may follow from the messages
        if template.server.beyond_sums() is None:
            yield path.stem


def run_of(folder: Path, words: Sequence[str]) -> Path:
    """Where the run of these words is, or will be."""
    return folder / Configuration(words).default_run_dir


def unfinished(folder: Path, cases: Sequence[Sequence[str]]) -> Iterator[tuple[Sequence[str], Path]]:
    """Words of runs that are not finished, with their folders."""
    for words in cases:
        path = run_of(folder, words)
        if not (path / "summary.json").exists():
            yield words, path


def in_process(folder: Path, cases: Sequence[Sequence[str]]) -> None:
    """Run what is not finished in this process."""
    for words, path in unfinished(folder, cases):
        started = time.process_time()
        with redirect_stdout(io.StringIO()):
            fedlscl(["fit", *words, f"--run_dir={path}"])
        print(f"{path.name}: {time.process_time() - started:.1f} s of CPU time", file=sys.stderr, flush=True)


def on_flower(folder: Path, cases: Sequence[Sequence[str]], cpus: int) -> None:
    """Run what is not finished, one run after another on the same nodes."""
    missing = [words for words, _ in unfinished(folder / "server", cases)]
    if not missing:
        return
    with redirect_stdout(sys.stderr), Deployment(folder, missing[0], simulate=cpus) as deployed:
        for index in range(deployed.clients):
            deployed.register(f"client-{index}")
            deployed.start_node(f"client-{index}")
        for words in missing:
            started, deployed.words = time.monotonic(), [*words]
            deployed.wait(deployed.run())
            print(f"{run_of(folder, words).name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def compared(plain: Path, secure: Path, engines: Mapping[str, Path]) -> dict[str, Any]:
    """Two runs beside each other, and the second beside the same on other engines.

    Args:
        plain: the folder of a run in one process without secure sums.
        secure: that of the same run with them.
        engines: that of the same on Flower, by engine; one that is not there was not run.

    Returns:
        Final averages under `seen` in %; the largest difference of any accuracy, in points, and whose it is, which
        does not exist if all are equal; by how much clients' states differ, see `distance`; bytes; and by engine
        whether all that is `EQUAL` is so to the last bit.
    """
    one, other = (json.loads((path / "summary.json").read_text()) for path in (plain, secure))
    largest, of = 0.0, None
    for mask, values in one["accuracy"].items():
        matrices = [np.array(found, dtype=float) for found in (values["matrix"], other["accuracy"][mask]["matrix"])]
        if not np.array_equal(*(np.isnan(matrix) for matrix in matrices)):
            raise ValueError(f"'{secure}' has accuracies where '{plain}' has none, or the other way round")
        apart = np.nan_to_num(np.abs(matrices[0] - matrices[1]))
        if apart.max() > largest:
            client, after, task = (int(n) for n in np.unravel_index(apart.argmax(), apart.shape))
            largest, of = float(apart.max()), {"mask": mask, "client": client, "after": after + 1, "task": task + 1}
    same = {}
    for name, path in engines.items():
        if (path / "summary.json").exists():
            found = json.loads((path / "summary.json").read_text())
            same[name] = all(json.dumps(found[key]) == json.dumps(other[key]) for key in EQUAL)
    return {
        "method": other["method"],
        "rounds": other["config"]["federation"]["rounds"],
        "bits": other["config"]["federation"]["fraction_bits"] or "default",
        "seed": other["seed"],
        "seen": [summary["accuracy"]["seen"]["final_average"] for summary in (one, other)],
        "difference": largest,
        "of": of,
        "states": distance(clients(plain), clients(secure)),
        "bytes_up": [summary["bytes_up"]["total"] for summary in (one, other)],
        "engines": same,
    }


def clients(run_dir: Path) -> Iterator[Mapping[str, Tensor]]:
    """All that each client of a run in one process has at its end."""
    found = states(run_dir)
    return (found[name] for name in sorted(found) if name.startswith("client-"))


def distance(ones: Iterator[Mapping[str, Tensor]], others: Iterator[Mapping[str, Tensor]]) -> float:
    """The largest difference of any value, over the largest of its tensor; infinite if other tensors are there."""
    largest = 0.0
    for one, other in zip(ones, others, strict=True):
        if {name: tensor.shape for name, tensor in one.items()} != {n: tensor.shape for n, tensor in other.items()}:
            return math.inf
        for name, tensor in one.items():
            apart = (tensor.double() - other[name].double()).abs()
            if tensor.numel() and float(apart.max()) > 0:
                largest = max(largest, float(apart.max() / tensor.double().abs().max()))
    return largest


def row(method: Sequence[Mapping[str, Any]]) -> str:
    """A line of the table: a method's entries, one for each seed; engines are those of all seeds that were run."""
    first, worst = method[0], max(method, key=lambda found: found["difference"])
    of = "–"
    if worst["of"] is not None:
        of = "seed {seed}, {mask}, client {client}, after task {after}, task {task}".format(**worst, **worst["of"])
    plain, secure = (", ".join(f"{found['seen'][n]:.2f}" for found in method) for n in (0, 1))
    same: dict[str, bool] = {}
    for found in method:
        for name, equal in found["engines"].items():
            same[name] = same.get(name, True) and equal
    states = max(found["states"] for found in method)
    cells = (
        *(first["method"], first["rounds"], first["bits"], ", ".join(str(found["seed"]) for found in method)),
        *(plain, secure, f"{worst['difference']:.4f}", of, f"{states:.1g}" if states else "0"),
        *(f"{first['bytes_up'][0]:,}", f"{first['bytes_up'][1] / first['bytes_up'][0]:.2f}"),
        ", ".join(f"{name} {'equal' if equal else 'DIFFERENT'}" for name, equal in same.items()) or "not run",
    )
    return f"| {' | '.join(map(str, cells))} |"


def parity(
    folder: Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    engines: Sequence[str],
    fields: Sequence[str],
    bits: int | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Run what is not finished, then for each method an entry for each seed, see `compared`.

    Those go to `parity.json` in the folder too, beside those of earlier calls.
    """
    by_method = {method: [Case(method, seed, tuple(fields), bits) for seed in seeds] for method in methods}
    cases = [case for of_method in by_method.values() for case in of_method]
    in_process(folder, [case.words(secure) for case in cases for secure in (False, True)])
    for engine in engines:
        for seed in seeds:  # a node has the images that a seed gives it
            of_seed = [case.words(secure=True) for case in cases if case.seed == seed]
            on_flower(folder / f"{engine}-{seed}", of_seed, ENGINES[engine])
    path = folder / "parity.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for of_method in by_method.values():
        found = []
        for case in of_method:
            plain, secure = (run_of(folder, case.words(secure)) for secure in (False, True))
            flower = {name: folder / f"{name}-{case.seed}" / "server" for name in ENGINES}
            runs = {name: run_of(path, case.words(secure=True)) for name, path in flower.items()}
            found.append(compared(plain, secure, runs))
            known[secure.name] = found[-1]
        path.write_text(json.dumps(known, indent=1))
        yield found
