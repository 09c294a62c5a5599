"""Whether two versions of the software compute the same: all methods on the digits in both, compared to the last bit.

    python experiments/same_numbers.py OLD NEW FOLDER [--methods NAME ...] [--jobs 2]

OLD and NEW are checkouts, each run by `uv run` in its own environment; their runs lie in FOLDER/old and FOLDER/new and
are not repeated, so that an interrupted comparison goes on. Compared are accuracies, bytes, operations, who was left
out, every number in metrics.csv but seconds, and every tensor of every state that OLD has. Tensors that have other
names in NEW, or are cut otherwise, must hold the same values. Exit code 1 if a method differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

COMPARED = ("accuracy", "bytes_up", "bytes_down", "bytes_setup_per_client", "compute", "skipped", "split_sha256")


def run(tree: Path, method: str, folder: Path) -> str | None:
    """Run one method unless it is there; the last line of what it wrote if it failed."""
    if (folder / "summary.json").exists():
        return None
    words = [f"--config=experiments/{name}.yaml" for name in ("digits", f"methods/{method}")]
    words += ["--threads=1", "--trainer.accelerator=cpu", "--tracking.wandb_mode=disabled", f"--run_dir={folder}"]
    done = subprocess.run(["uv", "run", "fedlscl", "fit", *words], cwd=tree, capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no output"])[-1]


def states(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of every state in a run's checkpoint."""
    files: Mapping[str, list[str]] = json.loads((folder / "checkpoint" / "state.json").read_text())["files"]
    return {
        name: {key: tensor for part in parts for key, tensor in load_file(folder / "checkpoint" / part).items()}
        for name, parts in files.items()
    }


def numbers(folder: Path) -> list[str]:
    """The rows of metrics.csv that do not measure time."""
    return [line for line in (folder / "metrics.csv").read_text().splitlines() if "/seconds/" not in line]


def content(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    """All that a tensor is, to the last bit."""
    return str(tensor.dtype), tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def values(tensors: list[Tensor]) -> Tensor:
    """All numbers of some tensors, ascending."""
    return torch.cat([torch.empty(0), *(tensor.double().flatten() for tensor in tensors)]).sort().values


def differences(old: Path, new: Path) -> Iterator[str]:
    """In what two runs differ."""
    one, other = (json.loads((folder / "summary.json").read_text()) for folder in (old, new))
    yield from (name for name in COMPARED if one[name] != other[name])
    before, after = numbers(old), numbers(new)
    if before != after:
        changed = sum(a != b for a, b in zip(before, after, strict=False)) + abs(len(before) - len(after))
        yield f"metrics.csv ({changed} of {len(before)} rows)"
    had, has = states(old), states(new)
    yield from (f"no state {name}" for name in sorted(had.keys() - has.keys()))
    for name in sorted(had.keys() & has.keys()):
        common = had[name].keys() & has[name].keys()
        same = all(content(had[name][key]) == content(has[name][key]) for key in common)
        moved = [values([state[key] for key in state.keys() - common]) for state in (had[name], has[name])]
        if not same or not torch.equal(*moved):
            yield f"tensors of {name}"


def main() -> None:
    """Run, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", nargs="+", help="all that OLD has, by default")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    found = sorted(path.stem for path in (options.old / "experiments" / "methods").glob("*.yaml"))
    methods = options.methods or found
    places = {method: tuple(options.folder.resolve() / side / method for side in ("old", "new")) for method in methods}
    trees, unequal = (options.old, options.new), 0
    with ThreadPoolExecutor(options.jobs) as pool:
        pending = {
            method: [pool.submit(run, tree, method, at) for tree, at in zip(trees, places[method], strict=True)]
            for method in methods
        }
        for method, runs in pending.items():
            failed = [reason for done in runs if (reason := done.result())]
            different = failed or list(differences(*places[method]))
            unequal += bool(different)
            print(f"{method}: {'; '.join(different) or 'equal'}", flush=True)
    print(f"{len(methods) - unequal} of {len(methods)} equal to the last bit")
    sys.exit(unequal > 0)


if __name__ == "__main__":
    main()
