"""A federation from Python: all that `fedlscl fit` builds from a configuration, built from objects."""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from rich.console import Console

from fedlscl.checks import path as path_of
from fedlscl.client import Client
from fedlscl.data.module import FederatedDataModule
from fedlscl.federation.algorithm import Federation
from fedlscl.federation.callback import FederationCallback, RoundResult
from fedlscl.federation.store import Store
from fedlscl.federation.template import Template
from fedlscl.federation.trainer import TALKATIVE, RoundTrainer
from fedlscl.federation.transport import InProcess
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.run.console import FederationProgress, ProgressCallback
from fedlscl.schedule import Schedule
from fedlscl.server import Server


def simulate(
    *,
    client: Client,
    server: Server,
    data: FederatedDataModule,
    vit: FrozenViT,
    cnn: SmallModelSpec,
    rounds: int = 5,
    clients_per_round: int | None = None,
    secure: bool = False,
    seed: int = 42,
    accelerator: str = "auto",
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
    folder: str | Path | None = None,
    progress: bool = False,
) -> Iterator[RoundResult]:
    """Run a federation in this process, and give the result of each round when it is over.

    Everything is checked when this is called; clients train while the rounds are iterated over. With the same
    arguments, the same numbers as `fedlscl fit` has with the same configuration.

    Args:
        client: the settings of all clients, such as `fedlscl.methods.FedLSCL(...)`.
        server: fuses what they send.
        data: the images and their split; its seed is `seed` where it has none.
        vit: the frozen model of all clients.
        cnn: their small models.
        rounds: communication rounds for each task.
        clients_per_round: how many clients, drawn anew, take part in each round; all of them by default.
        secure: let the server learn sums over the clients alone, see docs/privacy.md.
        seed: of all that is drawn.
        accelerator: cpu, gpu, mps or auto, as in Lightning.
        precision: as in Lightning.
        folder: where the clients' states are kept, new or empty; by default a temporary one, gone in the end.
        progress: show a progress bar, in a terminal or a notebook.

    Returns:
        The rounds, of all tasks one after another; `RoundResult.mean` is the accuracy of one.

    Raises:
        ValueError: if something does not fit, by the name of its field; or if `folder` holds something.
        RuntimeError: from the iteration, if nobody takes part in a round to its end.
    """

    def trainer(logger: Logger | None) -> Trainer:
        made = RoundTrainer(accelerator, precision)
        made.logger = logger
        return made

    folder = None if folder is None else path_of(folder)
    if folder is not None and folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"folder '{folder}' holds something; give a new one (a run that goes on where it was interrupted is what "
            "`fedlscl fit` is for)"
        )
    if data.seed is None:
        data.seed = seed
    data.prepare_data()
    data.setup()
    with ExitStack() as stack:
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="fedlscl-"))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        with _quiet():
            template, store = Template(client, data, vit, cnn, seed, trainer, server), Store(folder)
            schedule = Schedule(rounds, clients_per_round, secure)
            federation = Federation(schedule, template, store, InProcess(template, store))
        closing = stack.pop_all()
    found = _rounds(federation, progress, closing)
    weakref.finalize(found, closing.close)  # a generator that nobody has begun does not come to its end
    return found


def _rounds(federation: Federation, progress: bool, stack: ExitStack) -> Iterator[RoundResult]:
    with stack:
        callback = FederationCallback()
        if progress:
            tasks, rounds = federation.template.data.split.spec.tasks, federation.schedule.rounds
            taking_part = federation.schedule.clients_per_round or federation.clients
            bar = stack.enter_context(FederationProgress(tasks, rounds, taking_part, console=Console()))
            callback = ProgressCallback(bar, rounds)
        found = federation.run(callback)
        while True:
            with _quiet():
                result = next(found, None)
            if result is None:
                return
            yield result


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning silent inside, and leave it as it was."""
    loggers = [logging.getLogger(name) for name in TALKATIVE]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            # Lightning 2.6 asks torch for a name that newer releases of torch deprecate
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
