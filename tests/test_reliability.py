"""The command that tries to break the software: a few cases of what concerns files, and its model of the power."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

EXPERIMENTS = Path(__file__).parent.parent / "experiments"

FEW = """
import importlib, sys, tempfile
from pathlib import Path

for name, count in (("kills", 1), ("disks", 1), ("damage", 3)):
    with tempfile.TemporaryDirectory() as folder:
        text, faults = importlib.import_module(f"reliability.{name}").run(Path(folder), 3, count)
    print(text)
    if name != "damage":
        assert not faults
    else:  # what is in the cache is not asked for here
        assert "fault in a" not in text and "fault in an" not in text
"""


@pytest.mark.processes
def test_a_few_kills_full_disks_and_damages(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXPERIMENTS), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", FEW], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"[-3000:]


def test_what_a_power_failure_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    from reliability.changes import Change
    from reliability.power import MODES, Disk

    root = Path("/run")
    disk = Disk(root)

    def left(mode: int = 0) -> dict[str, bytes | None]:
        return disk.left(mode, Random(0))

    disk.apply(Change("mkdir", root / "a"))
    disk.apply(Change("open", root / "a" / "new", target=True))
    disk.apply(Change("write", root / "a" / "new", b"1234", 0))
    assert left(0) == {}
    assert left(1) == {"a": None, "a/new": b""}  # the names were written, the contents not yet
    disk.apply(Change("fsync", root / "a" / "new"))
    disk.apply(Change("fsync", root))
    assert left(0) == {"a": None}  # a's names are not synced
    disk.apply(Change("fsync", root / "a"))
    assert left(0) == left(1) == {"a": None, "a/new": b"1234"}
    disk.apply(Change("write", root / "a" / "new", b"56", 4))
    disk.apply(Change("truncate", root / "a" / "new", target=5))
    disk.apply(Change("replace", root / "a" / "new", target=root / "b"))
    assert left(0) == {"a": None, "a/new": b"1234"}
    assert left(1) == {"a": None, "b": b"1234"}
    disk.apply(Change("fsync", root / "b"))
    disk.apply(Change("fsync", root))
    assert left(0) == {"a": None, "a/new": b"12345", "b": b"12345"}  # in both: nobody synced the folder that it left
    disk.apply(Change("unlink", root / "b"))
    assert left(0)["b"] == b"12345"
    assert "b" not in left(1)
    seen = {tuple(sorted(disk.left(2, Random(seed)))) for seed in range(20)}
    assert seen == {("a",), ("a", "b"), ("a", "a/new"), ("a", "a/new", "b")}
    assert len(MODES) == 3
