"""Command lines of `fedlscl` in processes of their own that need not import anything: forks of one that has."""

from __future__ import annotations

import csv
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch.loops
import matplotlib.font_manager
import timm
import torch
import torch.utils.flop_counter
from PIL import Image

import fedlscl.analysis.tables
import fedlscl.methods.fed_lscl
import fedlscl.run.predict
from fedlscl import cli
from fedlscl.files import write_atomically
from fedlscl.run import plots
from reliability import mini

Image.init()
# Pictures take half of the time: here each is a file that is written in the same way and holds no picture
plots._save = lambda figure, path: write_atomically(path, b"no picture")


class Outcome(NamedTuple):
    """How a process ended: its exit code (the negative number of a signal), and what it said."""

    code: int
    text: str

    @property
    def traceback(self) -> bool:
        """Whether it ended in a traceback."""
        return "Traceback (most recent call last)" in self.text


def forked(words: Sequence[str], prepare: Callable[[], object] = lambda: None) -> Outcome:
    """Run a command line in a fork of this process, which must have used torch for nothing yet.

    Args:
        words: those behind `fedlscl`.
        prepare: called in the fork, before.
    """
    with tempfile.TemporaryFile() as said:
        sys.stdout.flush()
        child = os.fork()
        if not child:
            _be_a_child(words, prepare, said.fileno())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return Outcome(code, said.read().decode(errors="replace"))


def _be_a_child(words: Sequence[str], prepare: Callable[[], object], said: int) -> None:
    code = 1
    try:
        os.dup2(said, 1)
        os.dup2(said, 2)
        torch.set_num_threads(1)
        sys.argv[1:] = []  # Lightning's CLI looks at it
        prepare()
        try:
            cli.main([*words])
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def fit(config: Path, run_dir: Path) -> list[str]:
    """The words that run or continue a federation."""
    return ["fit", "--config", str(config), "--run_dir", str(run_dir)]


def numbers(run_dir: Path) -> Any:
    """All that a run measured, but what depends on time and place: of its summary, and of metrics.csv."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.reader(file) if not row[2].startswith("server/seconds/")]
    return summary_of(run_dir), rows


def summary_of(run_dir: Path) -> Any:
    """The part of `numbers` that the summary has."""
    summary = json.loads((run_dir / "summary.json").read_text())
    return {name: value for name, value in summary.items() if name not in ("seconds", "peak_memory_mib")}


def finished(folder: Path) -> tuple[Path, Path]:
    """The small federation's configuration, and the folder of its run, which is finished: what all others must equal.

    Raises:
        RuntimeError: if even this run fails.
    """
    config, whole = mini.write(folder), folder / "whole"
    outcome = forked(fit(config, whole))
    if outcome.code:
        raise RuntimeError(f"the run that nothing disturbs fails: {outcome.text}")
    return config, whole


USED = (
    *(fedlscl.analysis.tables, fedlscl.methods.fed_lscl, fedlscl.run.predict),
    *(lightning.pytorch.loops, matplotlib.font_manager, timm, torch.utils.flop_counter),
)
"""Modules that commands import when they are called, here once for all forks."""
