"""Archives that would fill the disk, or never end, are refused before they do."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from fedlscl.data import archives
from fedlscl.data.archives import unpack


def tar_of(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


@pytest.mark.parametrize("packed", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_every_usual_archive_is_unpacked(tmp_path: Path, packed: Callable[[bytes], bytes]) -> None:
    content = os.urandom(5000)
    (tmp_path / "a.tar").write_bytes(packed(tar_of(("in/x/1.jpg", content), ("in/2.jpg", b""), ("other", b"x"))))
    unpack(tmp_path / "a.tar", "in", tmp_path / "out")
    assert (tmp_path / "out" / "x" / "1.jpg").read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "out"]


def sparse(folder: Path) -> None:
    """4 bytes that stand for a terabyte of zeros."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("in/1.jpg")
        info.size = 4
        info.pax_headers = {"GNU.sparse.map": "0,4", "GNU.sparse.size": str(2**40), "GNU.sparse.numblocks": "1"}
        tar.addfile(info, io.BytesIO(b"data"))
    (folder / "a.tar").write_bytes(file.getvalue())


def holes(folder: Path) -> None:
    """A plain file of a terabyte in an archive that is mostly holes."""
    info = tarfile.TarInfo("in/1.jpg")
    info.size = 2**40
    with (folder / "a.tar").open("wb") as file:
        file.write(info.tobuf())
        file.truncate(2**40 + 2048)


def zeros(folder: Path) -> None:
    """Zeros, which are compressed a thousand times."""
    with gzip.open(folder / "a.tar", "wb", 9) as file:
        info = tarfile.TarInfo("in/1.jpg")
        info.size = 2**26
        file.write(info.tobuf())
        for _ in range(64):
            file.write(bytes(2**20))


def header(folder: Path) -> None:
    """A header that tarfile would read into memory."""
    with gzip.open(folder / "a.tar", "wb", 9) as file:
        info = tarfile.TarInfo("in/1.jpg")
        info.type, info.size = tarfile.XHDTYPE, 2**32
        file.write(info.tobuf())
        file.write(bytes(2**20))


def many(folder: Path) -> None:
    (folder / "a.tar").write_bytes(tar_of(*[(f"in/{n}", b"") for n in range(30)]))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (sparse, "in/1.jpg is sparse: 1,099,511,627,776 bytes, most of which are not there"),
        (holes, "its files are larger than what is free in"),
        (zeros, "it would hold more than .* bytes, 20 times its own size"),
        (header, "it would hold more than"),
        (many, "it has more than 20 members"),
    ],
)
def test_what_would_grow_without_bounds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None], message: str
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda path: usage(2**39))
    monkeypatch.setattr(archives, "MAX_FILES", 20)
    write(tmp_path)
    with pytest.raises(ValueError, match=rf"a\.tar cannot be unpacked \({message}"):
        unpack(tmp_path / "a.tar", "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
