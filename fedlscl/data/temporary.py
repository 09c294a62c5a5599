"""Temporary files and folders that a process holds while it lives, so that those of dead ones are known and removed."""

from __future__ import annotations

import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_PREFIX = ".part-"
_LEFT = (f"{_PREFIX}*", ".*.npy.*.tmp", ".unpack-*")  # the last two: by earlier versions
_FORGOTTEN = 86400.0  # seconds after which one is removed where there are no locks


@contextmanager
def temporary_file(target: Path) -> Iterator[BinaryIO]:
    """A new file beside `target`, to be written and read, that takes its place in one step when all went well."""
    while True:
        path = _new(target.parent)
        with path.open("x+b") as file:
            if not _held(file.fileno(), path):
                continue  # another process took it for one left behind
            try:
                yield file
                file.flush()
                os.replace(path, target)
            finally:
                path.unlink(missing_ok=True)
            return


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, removed at the end."""
    while True:
        path = _new(parent)
        path.mkdir()
        with _opened(path, os.O_RDONLY) as descriptor:
            if not _held(descriptor, path):
                continue
            try:
                yield path
            finally:
                shutil.rmtree(path, ignore_errors=True)
            return


def sweep(folder: Path) -> None:
    """Remove the temporary files and folders that no living process holds."""
    for path in [path for pattern in _LEFT for path in folder.glob(pattern)]:
        with suppress(OSError):  # it is somebody else's, or gone
            if path.is_dir():
                with _opened(path, os.O_RDONLY) as descriptor:
                    if _left_behind(descriptor):
                        shutil.rmtree(path, ignore_errors=True)
            else:
                with _opened(path, os.O_RDWR) as descriptor:
                    if _left_behind(descriptor):
                        path.unlink()


def _new(folder: Path) -> Path:
    return folder / f"{_PREFIX}{uuid.uuid4().hex}"


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _held(descriptor: int, path: Path) -> bool:
    """Lock a new file or folder, and whether it is still there then; without locks, that it is new."""
    return _lock(descriptor) is not False and path.exists()


def _left_behind(descriptor: int) -> bool:
    locked = _lock(descriptor)
    return locked if locked is not None else time.time() - os.fstat(descriptor).st_mtime > _FORGOTTEN


def _lock(descriptor: int) -> bool | None:
    """Whether this process has the lock now; None where there are none, as on some network disks."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return None
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True
