"""Files and locks: nothing half, left behind or lost with the power, and a disk without locks is not one in use."""

from __future__ import annotations

import ast
import errno
import fcntl
import logging
import os
import stat
import time
from pathlib import Path

import pytest

import fedlscl
from fedlscl import files
from fedlscl.files import content_of, is_temporary, locked, make_folder, naming, replacing, write_atomically

# ----------------------------------------------------------------- what is on the disk


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens in turn: the files and folders that are synced, and `replace`."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted(file: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)
        fsync(file)

    def replaced(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", noted)
    monkeypatch.setattr(files.os, "replace", replaced)
    return calls


def test_a_new_name_is_on_the_disk_too(tmp_path: Path, synced: list[str]) -> None:
    (tmp_path / "folder").mkdir()
    write_atomically(tmp_path / "folder" / "file", b"content")
    assert synced[1:] == ["replace", "folder"]
    assert synced[0].startswith(".file.")


def test_a_new_folder_is_on_the_disk_with_those_above_it(tmp_path: Path, synced: list[str]) -> None:
    make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path.name, "a"]
    make_folder(tmp_path / "a" / "b")
    assert len(synced) == 2


@pytest.mark.parametrize(("answer", "folder", "fails"), [(errno.EINVAL, True, False), (errno.EIO, True, True)])
def test_a_disk_that_cannot_sync_folders_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: int, folder: bool, fails: bool
) -> None:
    def refuse(file: int) -> None:
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr(files.os, "fsync", refuse)
    if fails:
        with pytest.raises(OSError, match=tmp_path.name):
            files.sync(tmp_path)
    else:
        files.sync(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        files.sync(tmp_path / "file")


def test_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"content")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_what_killed_processes_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    old, new, other = (tmp_path / f".{name}.tmp" for name in ("a[b].html.1", "a[b].html.2", "c.html.1"))
    for path in (old, new, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (0, time.time() - 2 * files.LEFT_BEHIND))
    write_atomically(tmp_path / "a[b].html", b"page")
    assert {path.name for path in tmp_path.iterdir()} == {"a[b].html", new.name, other.name}


def test_temporary_files_are_told_by_their_names(tmp_path: Path) -> None:
    with replacing(tmp_path / "state.json") as temporary:
        temporary.touch()
        assert is_temporary(temporary.name)
    assert is_temporary(".tmpAbC1eF")  # of safetensors
    assert not any(map(is_temporary, ("state.json", "a.tmp", ".lock", "client-0.1.safetensors", ".tmp")))


def test_what_is_missing_is_told_from_what_must_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert content_of(tmp_path / "nothing") is None

    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(PermissionError, match="Permission denied"):
        content_of(tmp_path / "nothing")


def test_an_error_says_which_file_it_is_about() -> None:
    with pytest.raises(OSError, match=r"No space left on device: 'metrics\.csv'"), naming(Path("metrics.csv")):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match=r"denied: 'other'"), naming(Path("metrics.csv")):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), "other")


# --------------------------------------------------------------------------------- locks


def test_a_lock_keeps_others_out_while_it_is_held(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with locked(path), pytest.raises(BlockingIOError), locked(path):
        pytest.fail("two have it")
    with locked(path):
        pass


@pytest.mark.parametrize("answer", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_not_one_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, answer: int
) -> None:
    def flock(file: int, how: int) -> None:
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr(fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING), locked(tmp_path / ".lock"):
        (record,) = caplog.records
        assert f"no lock for '{tmp_path}' (its disk answers: {os.strerror(answer)})" in record.message


def test_other_answers_of_a_disk_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: int, how: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match=r"Input/output error.*\.lock"), locked(tmp_path / ".lock"):
        pytest.fail("it has a lock")


def test_a_lock_empties_nothing(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match=r"\.lock' is a symbolic link"), locked(tmp_path / ".lock"):
        pass
    with locked(tmp_path / "precious"):
        assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("name", ["fcntl", "resource"])
def test_what_not_every_system_has_is_imported_where_it_is_used(name: str) -> None:
    """Or not even the help would be shown there."""
    for path in Path(fedlscl.__file__).parent.rglob("*.py"):
        if "flower" not in path.parts:
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.Import | ast.ImportFrom):
                    assert name not in {alias.name for alias in node.names}, path
                    assert getattr(node, "module", None) != name, path
