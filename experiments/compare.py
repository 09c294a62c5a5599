"""Print finished runs as a Markdown table: mean and deviation over seeds for each setting and method.

python experiments/compare.py RUN_DIR_OR_SUMMARY [...]

"new" is the accuracy on each task right after it was learned, as in the paper's Table 1, averaged over the tasks. A
star marks accuracies of a method that had to be told the task of a test image to choose its parameters.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from fedlscl.console import human_bytes
from fedlscl.evaluation import MASKS

ACCURACIES = ("new, task", *(f"final, {mask}" for mask in MASKS), "average, seen", "forgetting, seen")
HEADER = ("method", "seeds", *ACCURACIES, "up", "down", "seconds")


def row(method: str, runs: list[dict[str, Any]]) -> list[str]:
    """The cells of one method: accuracies in %, bytes per client and round, seconds for one run."""
    accuracy = [run["accuracy"] for run in runs]

    def star(mask: str) -> str:
        return "*" if mask in (runs[0].get("task_aware") or ()) else ""

    return [
        method,
        ", ".join(str(run["seed"]) for run in runs),
        spread([statistics.mean(entry["task"]["table1"]) for entry in accuracy]) + star("task"),
        *(spread([entry[mask]["final_average"] for entry in accuracy]) + star(mask) for mask in MASKS),
        spread([entry["seen"]["average_incremental"] for entry in accuracy]) + star("seen"),
        spread([entry["seen"]["forgetting"] for entry in accuracy]) + star("seen"),
        *(
            human_bytes(statistics.mean(run[f"bytes_{way}"]["per_client_round"] for run in runs))
            for way in ("up", "down")
        ),
        f"{statistics.mean(run['seconds']['total'] for run in runs):.0f}",
    ]


def spread(values: list[float | None]) -> str:
    """Mean and sample deviation; a single value alone; a dash where a metric is not defined."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.mean(known):.1f}"
    return f"{mean} ± {statistics.stdev(known):.1f}" if len(known) > 1 else mean


def main() -> None:
    """Group the given runs and print one table for each setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or their summary.json")
    groups: dict[tuple[str, ...], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for path in parser.parse_args().runs:
        summary = json.loads((path / "summary.json" if path.is_dir() else path).read_text())
        conditions = tuple(str(summary[key]) for key in ("setting", "backbone", "evaluated_on", "machine"))
        runs = groups[(*conditions, f"torch {summary['versions']['torch']}")][summary["method"]]
        if any(run["seed"] == summary["seed"] for run in runs):
            parser.error(f"{path}: another run of {summary['method']} with seed {summary['seed']} is in the table")
        runs.append(summary)
    for (setting, *others), methods in groups.items():
        print(f"**{setting}** ({'; '.join(others)})\n")
        print("| " + " | ".join(HEADER) + " |\n|" + " --- |" * len(HEADER))
        for method, runs in methods.items():
            print("| " + " | ".join(row(method, sorted(runs, key=lambda run: int(run["seed"])))) + " |")
        print()


if __name__ == "__main__":
    main()
