"""Finished runs made by hand, for tests of what is made of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlscl.analysis.results import Run
from fedlscl.evaluation import FloatArray
from fedlscl.run.summary import Accuracy, Compute, Summary, Traffic

CONFIG: dict[str, Any] = {
    "seed_everything": 42,
    "threads": 1,
    "data": {"source": {"class_path": "fedlscl.data.packed.Digits"}, "split": {"clients": 2, "tasks": 2}},
    "cnn": {"name": "resnet18"},
    "federation": {"rounds": 3},
    "model": {"class_path": "fedlscl.methods.x.X", "init_args": {"block": 3, "buffer_size": 10, "epochs": 1}},
}
"""A small federation on the digits."""

PAPER: dict[str, Any] = {
    "seed_everything": 42,
    "trainer": {"precision": "32-true"},
    "model": {
        "class_path": "fedlscl.methods.fed_lscl.FedLSCL",
        "init_args": {
            "block": 3,
            "rank": 4,
            "continual": {
                "class_path": "fedlscl.continual.Replay",
                "init_args": {"lambda_e": 0.1, "lambda_w": 0.01, "current": True},
            },
            "learning_rate": 1e-3,
            "epochs": 5,
            "batch_size": 16,
            "buffer_size": 20,
            "train_mask": "seen",
            "snapshot": "deployed",
        },
    },
    "data": {
        "source": {"class_path": "fedlscl.data.packed.CIFAR100"},
        "split": {
            "clients": 5,
            "tasks": 5,
            "classes_per_task": 8,
            "private_classes": 15,
            "public_classes": 25,
            "dirichlet_alpha": 1.0,
            "train_per_class": None,
            "test_per_class": None,
            "local_test": "official",
        },
    },
    "backbone": {"name": "vit_base_patch16_224.augreg_in21k", "image_size": 224, "model_args": None},
    "cnn": {"name": "resnet18", "image_size": 224, "model_args": None},
    "server": {"class_path": "fedlscl.methods.fed_lscl.ExactO2D", "init_args": {"strength": 0.5}},
    "federation": {"rounds": 5, "clients_per_round": None},
    "setting": "cifar100",
    "method": "fed_lscl",
}
"""The paper's protocol on CIFAR-100."""


LESS = {"task": 0.0, "seen": 10.0, "federation": 15.0, "none": 20.0}
"""How much lower a made run's accuracy is under each mask than under `task`."""


def accuracy(value: float, tasks: int = 2, clients: int = 2, step: float = 1.0) -> FloatArray:
    """acc[client, after, on] = value + 10 * after + step * on + client, NaN on tasks to come."""
    client, after, on = np.indices((clients, tasks, tasks))
    return np.where(on <= after, value + 10.0 * after + step * on + client, np.nan)


def constant(value: float, tasks: int, clients: int) -> FloatArray:
    """acc[client, after, on] = value, NaN on tasks to come."""
    return np.where(np.isnan(accuracy(0.0, tasks, clients)), np.nan, value)


def traffic(up: float, rounds: int = 3, clients: int = 2) -> Traffic:
    """Messages of so many bytes, one from each client in each round."""
    return Traffic.of([[round(up)] * clients] * rounds)


def make_summary(
    method: str = "fed_lscl",
    seed: int = 42,
    value: float = 50.0,
    *,
    base: Mapping[str, Any] = CONFIG,
    config: Mapping[str, Any] | None = None,
    acc: Mapping[str, npt.ArrayLike] | None = None,
    **changes: Any,
) -> Summary:
    """A summary as a run leaves it.

    Args:
        method: name of the method.
        seed: the seed.
        value: gives `accuracy(value)` under mask task, and less by `LESS` under the others.
        base: the configuration.
        config: what is other in it, by the names of the command line.
        acc: other arrays (clients, after task, on task) by mask.
        **changes: other fields of the summary.
    """
    setting = changes.get("setting", "digits")
    configured = copy.deepcopy(dict(base)) | {"seed_everything": seed, "setting": setting, "method": method}
    for name, change in (config or {}).items():
        *groups, last = name.split(".")
        inner = configured
        for group in groups:
            inner = inner.get("init_args", inner)[group]
        (inner if last == "class_path" else inner.get("init_args", inner))[last] = change
    cnn, backbone = configured["cnn"]["name"], configured.get("backbone", {"name": "a ViT", "image_size": 32})
    acc = acc or {mask: accuracy(value - less) for mask, less in LESS.items()}
    made = Summary(
        method=method,
        setting=setting,
        seed=seed,
        backbone=f"{backbone['name']}, {backbone['image_size']} px",
        cnn=cnn if isinstance(cnn, str) else tuple(cnn),
        evaluated_on="test images",
        split_sha256="0" * 64,
        accuracy={mask: Accuracy.of(np.array(values, dtype=np.float64)) for mask, values in acc.items()},
        bytes_up=traffic(1024),
        bytes_down=traffic(1024),
        bytes_setup_per_client=100,
        compute={"resnet18": Compute(1_500_000, 2_000_000_000, 10**9)},
        skipped=(),
        seconds={"total": 12.0, "fit": 10.0, "aggregate": 1.0, "evaluate": 1.0},
        peak_memory_mib=100.0,
        threads=1,
        machine="Linux x86_64, 2 threads",
        versions={"python": "3.11.7", "torch": "2.15.0"},
        config=configured,
    )
    return replace(made, **changes)


def make_run(*args: Any, **options: Any) -> Run:
    """A run that lies nowhere."""
    summary = make_summary(*args, **options)
    return Run(Path(f"runs/{summary.method}-{summary.seed}/summary.json"), summary)


def paper_run(
    method: str = "fed_lscl",
    seed: int = 42,
    average: float = 90.0,
    config: Mapping[str, Any] | None = None,
    setting: str = "cifar100",
    **changes: Any,
) -> Run:
    """A run of the paper's protocol with `average` everywhere under mask task, less by `LESS` under the others."""
    tasks = (config or {}).get("data.split.tasks", 5)
    acc = {mask: constant(average - less, tasks, 5) for mask, less in LESS.items()}
    sent = traffic(2048, rounds=25, clients=5)
    given = {"setting": setting, "bytes_up": sent, "bytes_down": sent, **changes}
    return make_run(method, seed, base=PAPER, config=config, acc=acc, **given)


def write_run(folder: Path, *args: Any, **options: Any) -> Path:
    """A run folder, with other files in it as a run leaves them."""
    folder.mkdir(parents=True)
    make_summary(*args, **options).write(folder / "summary.json")
    (folder / "split.json").write_text('{"split": {}}')
    (folder / "metrics.csv").write_text("task,round,metric,value\n")
    return folder
