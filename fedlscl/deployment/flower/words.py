"""What the words of a run on Flower stand for."""

from __future__ import annotations

import io
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path

from fedlscl.deployment.shares import LocalShare
from fedlscl.run.configuration import Configuration
from fedlscl.run.experiment import Experiment


def experiment_of(words: str, data: str) -> Experiment:
    """The experiment of a command line, with the data of `data`, a share, if that is not empty.

    Raises:
        ValueError: if the words describe none; what is wrong with them is on the standard error.
    """
    with as_error():
        experiment = Configuration(shlex.split(words)).build()
    if data:
        whole, share = experiment.data, LocalShare(Path(data), experiment.data.device_mib)
        for name, of_share, configured in (
            ("seed", share.seed, whole.seed),
            ("split", share.split_spec, whole.split_spec),
        ):
            if of_share != configured:
                raise ValueError(f"{data} was dealt with data.{name} {of_share}, the run has {configured}; deal again")
        experiment = replace(experiment, data=share)
    experiment.load()
    return experiment


@contextmanager
def as_error() -> Iterator[None]:
    """Words that cannot be parsed end a command; here they must not end Flower's process."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            yield
    except (ValueError, OSError) as error:  # of shlex, and of what cannot be built
        raise ValueError(f"words of the run or the node: {error}") from error
    except SystemExit as end:
        reason = " ".join(said.getvalue().split())[-500:] or end
        raise ValueError(f"words of the run or the node: {reason}") from end
