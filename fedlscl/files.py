"""Files that are there whole or not at all, whenever the process is killed."""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import tempfile
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def unpack(archive: Path, inner: str, folder: Path) -> None:
    """Unpack the folder `inner` of a tar archive as `folder`, whole or not at all; plain files and folders only."""
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=folder.parent) as temporary:
        root = Path(temporary).resolve()
        try:
            with tarfile.open(archive) as tar:
                for member in tar:  # not extractall: Python before 3.11.4 has no safe form of it
                    path = (root / member.name).resolve()
                    if not path.is_relative_to(root):
                        raise tarfile.ExtractError(f"{member.name} would be outside the folder")
                    if member.isdir():
                        continue
                    content = tar.extractfile(member) if member.isfile() else None
                    if content is None:
                        raise tarfile.ExtractError(f"{member.name} is a link or a device, no file or folder")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with content, path.open("wb") as file:
                        shutil.copyfileobj(content, file)
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{archive} cannot be unpacked ({error}); fetch it again") from error
        unpacked = Path(temporary) / inner
        if not unpacked.is_dir():
            raise ValueError(f"{archive} has no folder {inner}; is it the right archive?")
        if not folder.is_dir():  # another process may have been faster
            os.replace(unpacked, folder)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what was written there then takes the place of `path` in one step."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until what was written to `path` would also survive a power failure."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_atomically(path: Path, content: bytes) -> None:
    """Write `path` so that a reader sees the old file or the new one, complete, whatever happens."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
        sync(temporary)
