"""Archives of images, unpacked whole or not at all and never without bounds."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from fedlscl.data.temporary import sweep, temporary_folder

MAX_FILES = 1_000_000
"""Members of an archive."""

MAX_RATIO = 20
"""Bytes that an archive may hold for each byte that it has; images, compressed again, hardly get smaller."""

_OPENERS: tuple[Callable[..., Any], ...] = (gzip.open, bz2.open, lzma.open, open)


def unpack(archive: Path, inner: str, folder: Path) -> None:
    """Unpack the folder `inner` of a tar archive as `folder`, whole or not at all; plain files and folders only.

    Raises:
        ValueError: it is damaged, holds something else or files outside its folder, or more than `MAX_FILES` files,
            `MAX_RATIO` times its own size, or what fits on the disk.
    """
    sweep(folder.parent)
    limit = 2**20 + MAX_RATIO * archive.stat().st_size
    with temporary_folder(folder.parent) as temporary:
        free = shutil.disk_usage(temporary).free
        try:
            with _Bounded(archive, limit) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:  # type: ignore[call-overload]
                _write(tar, temporary.resolve(), free)
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
            raise ValueError(f"{archive} cannot be unpacked ({error}); fetch it again") from error
        unpacked = temporary / inner
        if not unpacked.is_dir():
            raise ValueError(f"{archive} has no folder {inner}; is it the right archive?")
        if not folder.is_dir():  # another process may have been faster
            os.replace(unpacked, folder)


def _write(tar: tarfile.TarFile, root: Path, free: int) -> None:
    files = 0
    for member in tar:  # not extractall: Python before 3.11.4 has no safe form of it
        tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
        files += 1
        free -= member.size
        if files > MAX_FILES:
            raise tarfile.ExtractError(f"it has more than {MAX_FILES:,} members")
        if member.issparse():
            raise tarfile.ExtractError(f"{member.name} is sparse: {member.size:,} bytes, most of which are not there")
        if free < 0:
            raise tarfile.ExtractError(f"its files are larger than what is free in {root.parent}")
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


class _Bounded:
    """The content of an archive, decompressed, that may not be read beyond a limit, by whatever tarfile reads there."""

    def __init__(self, path: Path, limit: int) -> None:
        self._limit = limit
        for opener in _OPENERS:
            file = opener(path, "rb")
            try:
                file.peek(1)
            except (OSError, EOFError, lzma.LZMAError, zlib.error):  # not compressed like this
                file.close()
            else:
                break
        self._file: BinaryIO = file

    def __enter__(self) -> _Bounded:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, position: int) -> int:
        self._check(position)
        return self._file.seek(position)

    def read(self, size: int) -> bytes:
        self._check(self._file.tell() + size)
        return self._file.read(size)

    def _check(self, position: int) -> None:
        if position > self._limit:
            raise tarfile.ReadError(f"it would hold more than {self._limit:,} bytes, {MAX_RATIO} times its own size")
