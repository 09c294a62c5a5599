"""The Lightning Trainer of one round: lean, because a federation makes a fresh one for each of hundreds of fits."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Literal

import torch.utils.deterministic
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities import registry
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy

from fedlscl.federation.captured import CapturingStrategy, cuda_graph

TALKATIVE = ("lightning.pytorch", "lightning.fabric")
"""Loggers that tell of devices and hints whenever a Trainer is made, which here is hundreds of times."""

# Whenever a Trainer is made Lightning reads of all installed packages whether they have callbacks for it
registry.entry_points = cache(entry_points)  # type: ignore[assignment, attr-defined]


class RoundTrainer(Trainer):
    """A Trainer for one pass over one round's batches on one device.

    Args:
        accelerator: cpu, gpu, mps or auto, as in Lightning.
        precision: 32-true, bf16-mixed or 16-mixed; bf16-mixed is faster where the hardware has bf16 units.
        deterministic: only deterministic algorithms, for equal numbers on a GPU.
        capture: on an NVIDIA GPU, record a client's training step and repeat it, with the same numbers, see `captured`.
    """

    def __init__(
        self,
        accelerator: str = "auto",
        precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
        deterministic: bool = True,
        capture: bool = True,
    ) -> None:
        # Deterministic mode would also fill every new tensor, a tenth of the time of a small step, against reads of
        # memory that was never written; there are none
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        super().__init__(
            accelerator=accelerator,
            devices=1,
            strategy=_strategy(accelerator, capture),
            precision=precision,
            deterministic=deterministic,
            logger=False,
            max_epochs=1,
            log_every_n_steps=1,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_autolog_hparams=False,
            use_distributed_sampler=False,
            # In a SLURM job Lightning would put the job back into the queue by itself at SIGUSR1, with a checkpoint of
            # one fit in the current folder, and load into every later fit any hpc_ckpt_*.ckpt that it finds there
            plugins=[LightningEnvironment()],
            default_root_dir=os.devnull,
        )


def _strategy(accelerator: str, capture: bool) -> SingleDeviceStrategy | Literal["auto"]:
    if capture and accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return CapturingStrategy(torch.device("cuda", 0), cuda_graph)
    return "auto"


class StepCount(Callback):
    """Reports after every step how many of a fit's steps are done, and of how many (infinity if nobody knows)."""

    def __init__(self, report: Callable[[int, float], None]) -> None:
        self.report = report

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One more."""
        self.report(batch_idx + 1, trainer.num_training_batches)


def fit_once(trainer: Trainer, module: LightningModule) -> None:
    """Fit, and let go of the optimizer: a Trainer sits in reference cycles that Python may collect much later."""
    trainer.fit(module)
    trainer.strategy.optimizers = []
