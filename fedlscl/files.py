"""Files that are there whole or not at all, whenever the process is killed or the power fails, and locks on them."""

from __future__ import annotations

import errno
import glob
import hashlib
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger(__name__)

LEFT_BEHIND = 3600.0
"""Seconds after which a temporary file that nobody has written to is one that a killed process has left behind."""

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
"""What a disk answers that has no locks, as some network disks have none."""

_TEMPORARY = re.compile(r"\..+\.tmp|\.tmp\w{6}")  # ours, and those of safetensors, which wrote the files once


class Damaged(ValueError):
    """A file is missing or is not what was written; the text names it and says what can be done."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what was written there then takes the place of `path` in one step.

    It is on the disk before it bears the name, and bears it there before this returns. What killed processes have left
    behind of earlier attempts is removed.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(FileNotFoundError):  # another process may have been faster
            if time.time() - left.stat().st_mtime > LEFT_BEHIND:
                left.unlink()
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with naming(path):
            yield temporary
            sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    """Whether a file of this name is one that only an interrupted process leaves behind."""
    return _TEMPORARY.fullmatch(name) is not None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add to an error of the system which file it is about, which it does not say of one that is open."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Wait until what was written to a file, or the names in a folder, would also survive a power failure."""
    if os.name == "nt":  # there no folder can be opened, and no file that is not written to be forced onto the disk
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(opened)
    except OSError as error:
        if not (error.errno in (errno.EINVAL, *NO_LOCKS) and path.is_dir()):  # some network disks do so for files alone
            raise
    finally:
        os.close(opened)


def write_atomically(path: Path, content: bytes) -> None:
    """Write `path` so that a reader sees the old file or the new one, complete, whatever happens."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, unless it is there; a power failure does not undo it."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def content_of(path: Path) -> bytes | None:
    """What is in a file, or None if there is none.

    Raises:
        OSError: if there is one that cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def sha256(content: bytes) -> str:
    """The checksum by which a file is known again."""
    return hashlib.sha256(content).hexdigest()


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes from what a lock file stands for; the lock goes with the process, however that ends.

    Where there are no locks (some network disks, Windows) a warning says so, and this goes on without.

    Args:
        path: the lock file.
        wait: until another process lets go of it.

    Raises:
        BlockingIOError: if another process has it, unless this waits.
        ValueError: if `path` is a symbolic link.
        OSError: if the file cannot be opened or made.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"'{path}' is a symbolic link, must be a file of its own: delete it") from error
        raise
    try:
        with naming(path):
            _lock(file, path, wait)
        yield
    finally:
        os.close(file)


def _lock(file: int, path: Path, wait: bool) -> None:
    try:
        import fcntl
    except ImportError:
        reason = "this system has none"
    else:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            reason = f"its disk answers: {error.strerror}"
    log.warning("no lock for '%s' (%s); let no other process use it at the same time", path.parent, reason)
