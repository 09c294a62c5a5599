"""Print finished runs as a Markdown table: mean and deviation over seeds for each setting and method.

python experiments/compare.py RUN_DIR_OR_SUMMARY [...]
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

HEADER = ("method", "seeds", *(f"final, {mask}" for mask in MASKS), "forgetting, seen", "up", "down", "seconds")


def row(method: str, runs: list[dict[str, Any]]) -> list[str]:
    """The cells of one method: accuracies in %, bytes per client and round, seconds for one run."""
    accuracy = [run["accuracy"] for run in runs]
    return [
        method,
        ", ".join(str(run["seed"]) for run in runs),
        *(spread([entry[mask]["final_average"] for entry in accuracy]) for mask in MASKS),
        spread([entry["seen"]["forgetting"] for entry in accuracy]),
        *(
            human_bytes(statistics.mean(run[f"bytes_{way}"]["per_client_round"] for run in runs))
            for way in ("up", "down")
        ),
        f"{statistics.mean(run['seconds']['total'] for run in runs):.0f}",
    ]


def spread(values: list[float]) -> str:
    """Mean and sample deviation; a single value alone."""
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def main() -> None:
    """Group the given runs and print one table for each setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or their summary.json")
    settings: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for path in parser.parse_args().runs:
        summary = json.loads((path / "summary.json" if path.is_dir() else path).read_text())
        settings[summary["setting"]][summary["method"]].append(summary)
    for setting, methods in settings.items():
        some = next(iter(methods.values()))[0]
        conditions = (some["backbone"], some["evaluated_on"], some["machine"], f"torch {some['versions']['torch']}")
        print(f"**{setting}** ({'; '.join(conditions)})\n")
        print("| " + " | ".join(HEADER) + " |\n|" + " --- |" * len(HEADER))
        for method, runs in methods.items():
            print("| " + " | ".join(row(method, sorted(runs, key=lambda run: int(run["seed"])))) + " |")
        print()


if __name__ == "__main__":
    main()
