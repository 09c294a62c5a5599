"""Finished runs made by hand, for tests of what is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from fedlscl.analysis.results import Run
from fedlscl.evaluation import MASKS, FloatArray, summarise


def accuracy(value: float, tasks: int = 2, clients: int = 2, step: float = 1.0) -> FloatArray:
    """acc[client, after, on] = value + 10 * after + step * on + client, NaN on tasks to come."""
    client, after, on = np.indices((clients, tasks, tasks))
    return np.where(on <= after, value + 10.0 * after + step * on + client, np.nan)


def make_summary(method: str = "fed_lscl", seed: int = 42, value: float = 50.0, **changes: Any) -> dict[str, Any]:
    """A summary as a run writes it, with accuracies of `value` under mask task, 10 and 20 less under the others."""
    config: dict[str, Any] = {
        "seed_everything": seed,
        "threads": 1,
        "data": {"source": {"class_path": "Digits"}, "split": {"clients": 2, "tasks": 2}},
        "cnn": {"name": "resnet18"},
        "federation": {"rounds": 3},
        "model": {"class_path": "fedlscl.methods.x.X", "init_args": {"block": 3, "buffer_size": 10, "epochs": 1}},
    }
    for name, change in changes.pop("config", {}).items():
        *groups, last = name.split(".")
        inner = config
        for group in groups:
            inner = inner[group]
        inner.get("init_args", inner)[last] = change
    traffic = {"per_client_round": 1024.0, "total": 6144, "by_client": [3072, 3072], "by_round": [[1024, 1024]] * 3}
    return {
        "method": method,
        "setting": "digits",
        "seed": seed,
        "backbone": "a ViT, 32 px",
        "cnn": config["cnn"]["name"],
        "task_aware": [],
        "evaluated_on": "test images",
        "split_sha256": "0" * 64,
        "accuracy": {mask: summarise(accuracy(value - 10 * place)) for place, mask in enumerate(MASKS)},
        "bytes_up": traffic,
        "bytes_down": traffic,
        "bytes_setup_per_client": 100,
        "compute": {"resnet18": {"trained_parameters": 1_500_000, "flops_frozen": 2_000_000_000, "flops": 10**9}},
        "skipped": [],
        "seconds": {"total": 12.0, "fit": 10.0, "aggregate": 1.0, "evaluate": 1.0},
        "peak_memory_mib": 100.0,
        "threads": 1,
        "machine": "Linux x86_64, 1 threads",
        "versions": {"python": "3.11", "torch": "2.15"},
        "config": config,
        **changes,
    }


def make_run(*args: Any, **options: Any) -> Run:
    """A run that lies nowhere."""
    summary = make_summary(*args, **options)
    return Run(Path(f"runs/{summary['method']}-{summary['seed']}/summary.json"), summary)


def write_run(folder: Path, *args: Any, **options: Any) -> Path:
    """A run folder, with other files in it as a run leaves them."""
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(make_summary(*args, **options)))
    (folder / "split.json").write_text('{"split": {}}')
    (folder / "metrics.csv").write_text("task,round,metric,value\n")
    return folder
