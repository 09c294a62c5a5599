"""What is read once and kept in the cache folder: the hashes of image files, and images decoded from them.

Everything is known by content: decoded images by the hashes of all bytes of all files, and a file's hash by what the
file system says of it, unless it has only just been written.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from fedlscl.data.decoding import MAX_BYTES, Decoder, content_of
from fedlscl.data.source import ImageSet
from fedlscl.data.temporary import temporary_file
from fedlscl.files import write_atomically

CACHE_FORMAT = 2  # raise it when decoding changes, so that images decoded before are not used any more

_PROGRESS_FROM = 2000  # images; fewer are decoded before a progress bar is worth reading
_CHUNK = 64  # images that a thread takes at a time
_TICK = 2_000_000_000  # ns; a file system's clock is no coarser, so that a later change shows
_NAMED = 3  # images that an error names


class Contents:
    """The hashes of the files below a folder, remembered from one start to the next.

    Args:
        root: the folder, or one file.
        cache_dir: where they are remembered.
    """

    def __init__(self, root: Path, cache_dir: Path) -> None:
        self._prefix = f"{root.as_posix()}/"
        self._path = cache_dir / f"contents-{key(str(root.resolve()))}"  # a checksum in a line, and JSON
        self._known: dict[str, list[Any]] = {}
        with suppress(OSError, ValueError):
            checksum, _, content = self._path.read_bytes().partition(b"\n")
            if checksum == xxhash.xxh3_128_hexdigest(content).encode():
                self._known = json.loads(content)
        self._now: dict[str, list[Any]] = {}

    def of(self, paths: Sequence[Path], limit: int | None = None) -> list[str]:
        """The hash of each file; empty for one that cannot be read or has more than `limit` bytes."""

        found = [""] * len(paths)

        def read(start: int) -> int:
            chunk = range(start, min(start + _CHUNK, len(paths)))
            for k in chunk:
                with suppress(OSError):
                    found[k] = self._of(paths[k], limit)
            return len(chunk)

        _in_parallel(read, len(paths), "reading")
        return found

    def _of(self, path: Path, limit: int | None) -> str:
        name, begun, before = path.as_posix().removeprefix(self._prefix), time.time_ns(), _state(path)
        known = self._known.get(name)
        if known is not None and known[:-1] == before:
            self._now[name] = known
            return str(known[-1])
        if limit is not None and before[0] > limit:
            return ""
        digest = xxhash.xxh3_128()
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        if before == _state(path) and max(before[1:3]) + _TICK < begun:  # else it might change again within a tick
            self._now[name] = [*before, digest.hexdigest()]
        return digest.hexdigest()

    def save(self) -> None:
        """Remember what was found, and nothing else."""
        if self._now != self._known:
            with suppress(OSError):  # a cache that may only be read is one, too
                content = json.dumps(self._now, sort_keys=True).encode()
                write_atomically(self._path, xxhash.xxh3_128_hexdigest(content).encode() + b"\n" + content)

    def forget(self) -> None:
        """Have every file read again at the next start."""
        self._path.unlink(missing_ok=True)


def _state(path: Path) -> list[int]:
    """What changes whenever a file's content does: size, times of change (ns; the system sets the second), inode."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def key(*parts: object) -> str:
    """A short name for plain values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


class Files(NamedTuple):
    """A part of a data set: its images by class, and what errors call it."""

    name: str
    by_class: dict[str, list[Path]]


def load_images(
    kind: str, decoder: Decoder, root: Path, parts: Sequence[Files], cache_dir: Path
) -> tuple[ImageSet, ...]:
    """Map the decoded images of some parts into memory, after decoding what the cache does not hold.

    Args:
        kind: what names of cache files begin with.
        decoder: reads the images.
        root: the folder that all are in.
        parts: what belongs together.
        cache_dir: the cache folder.

    Raises:
        ValueError: images cannot be used, or are such that decoding has gone wrong.
        OSError: the disk is full.
    """
    contents, sets, total = Contents(root, cache_dir), [], 0
    problems: list[_Problem] = []
    for part in parts:
        paths = [path for paths in part.by_class.values() for path in paths]
        counts = [len(paths) for paths in part.by_class.values()]
        labels = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        hashes = contents.of(paths, MAX_BYTES)
        target = cache_dir / f"{kind}-{decoder.size}-{key(CACHE_FORMAT, decoder.settings, hashes)}.npy"
        shape = (len(paths), 3, decoder.size, decoder.size)
        found = _opened(target, shape)
        if found is None:
            _Build(decoder, part, paths, hashes, labels, problems).write(target, shape)
            found = _opened(target, shape)
        total += len(paths)
        if found is not None:
            sets.append(ImageSet.hashed(found[0], labels, found[1]))
        elif not problems:
            raise OSError(errno.EIO, f"{target} is not what was written there; is the disk sound?")
    if problems:
        if any(problem.changed for problem in problems):
            contents.forget()
        raise ValueError(_summed_up([problem.text for problem in problems], total))
    contents.save()
    return tuple(sets)


class _Problem(NamedTuple):
    text: str
    changed: bool = False


class _Build:
    """Decodes one part of a data set; `problems` are those of all parts so far."""

    def __init__(
        self,
        decoder: Decoder,
        part: Files,
        paths: list[Path],
        hashes: list[str],
        labels: NDArray[np.int64],
        problems: list[_Problem],
    ) -> None:
        self.decoder, self.part, self.paths, self.hashes, self.labels = decoder, part, paths, hashes, labels
        self.problems = problems
        self._vanished = np.zeros(len(paths), dtype=bool)
        self._looks = np.zeros(len(paths), dtype=np.uint64)  # the same for images that are
        self._colour = np.full((len(paths), 3), -1)  # of images of one colour
        self._writing = threading.Lock()

    def write(self, target: Path, shape: tuple[int, ...]) -> None:
        """Write the images and their checksum; nothing if there are problems, which are noted.

        Raises:
            OSError: there is no room for them.
            ValueError: all images were read, but not as they look.
        """
        with suppress(_Stopped), temporary_file(target) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            first = file.tell()
            _reserve(file, first + int(np.prod(shape)) + xxhash.xxh3_128().digest_size, target.parent)

            def decode(start: int) -> int:
                chunk = range(start, min(start + _CHUNK, len(self.paths)))
                pixels = np.stack([self._decoded(k) for k in chunk])
                with self._writing:
                    file.seek(first + start * pixels[0].nbytes)
                    file.write(pixels.tobytes())
                return len(chunk)

            with warnings.catch_warnings():  # here, as threads share their filters
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                _in_parallel(decode, len(self.paths), "decoding")
            if self.problems:
                raise _Stopped
            self._check()
            file.flush()
            file.seek(first)
            digest = _digest(file, int(np.prod(shape)))
            file.write(digest)

    def _decoded(self, k: int) -> NDArray[np.uint8]:
        try:
            content = content_of(self.paths[k])
            if self.hashes[k] and xxhash.xxh3_128_hexdigest(content) != self.hashes[k]:
                self.problems.append(_Problem(f"{self.paths[k]} changed while it was read; start again", True))
            pixels, self._vanished[k] = self.decoder.decode(content, self.paths[k])
        except (ValueError, FileNotFoundError) as error:
            self.problems.append(_Problem(str(error)))
            return np.zeros((3, self.decoder.size, self.decoder.size), np.uint8)
        self._looks[k] = xxhash.xxh3_64_intdigest(pixels.tobytes())
        if (pixels == pixels[:, :1, :1]).all():
            self._colour[k] = pixels[:, 0, 0]
        return pixels

    def _check(self) -> None:
        """Refuse images that nothing can be learned from, which nobody meant to look so.

        Raises:
            ValueError: all images look the same, a class is of one colour though its files are not, or two classes are
                of the same one.
        """
        uniform: dict[tuple[int, ...], str] = {}
        for label, name in enumerate(self.part.by_class):
            own = self.labels == label
            colours = {tuple(colour) for colour in self._colour[own].tolist()}
            colour = colours.pop()
            if colours or colour[0] < 0 or own.sum() < 2:
                continue
            where = f"{self.part.name}: all {own.sum()} images of class '{name}' are of the one colour {list(colour)}"
            if self._vanished[own].any():
                raise ValueError(
                    f"{where}, though their files are not; is it that of drawings on a transparent ground? Then set "
                    f"background to another colour (it is {list(self.decoder.background)})"
                )
            if (other := uniform.setdefault(colour, name)) != name:
                raise ValueError(f"{where}, as are those of class '{other}'; nothing can tell them apart. Look at them")
        if len(self.part.by_class) > 1 and len(set(self._looks.tolist())) == 1:
            raise ValueError(f"{self.part.name}: all {len(self.paths)} images look the same: {self.paths[0]} and so on")


class _Stopped(Exception):
    """There are problems, and nothing is to be written."""


def _summed_up(problems: Sequence[str], total: int) -> str:
    if len(problems) == 1:
        return problems[0]
    more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
    return f"{len(problems)} of {total} images cannot be used: {'; '.join(sorted(problems)[:_NAMED])}{more}"


def _opened(path: Path, shape: tuple[int, ...]) -> tuple[NDArray[np.uint8], str] | None:
    """Cached images, mapped into memory, with their checksum; None if there are none of this shape, or damaged ones."""
    try:
        images = np.lib.format.open_memmap(path, "r")  # refuses pickled content
        if images.shape != shape or images.dtype != np.uint8:
            return None
        with path.open("rb") as file:  # a disk that fails raises here, and would kill what reads mapped memory
            file.seek(images.offset)
            digest = _digest(file, images.nbytes)
            return (images, digest.hex()) if file.read() == digest else None
    except Exception:  # a damaged header ends in any error of numpy's
        return None


def _digest(file: BinaryIO, count: int) -> bytes:
    """Hash of the next `count` bytes."""
    digest = xxhash.xxh3_128()
    while count > 0 and (block := file.read(min(count, 2**22))):
        digest.update(block)
        count -= len(block)
    return digest.digest()


def _reserve(file: BinaryIO, size: int, folder: Path) -> None:
    """Have the disk set aside what will be written, and not find out hours later that it cannot."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                error.errno,
                f"{error.strerror}: {size / 2**20:.0f} MiB of decoded images do not fit into {folder}; make room, or "
                "name another folder as data.cache_dir or $FEDLSCL_CACHE",
            ) from error


def _in_parallel(do: Callable[[int], int], count: int, what: str) -> None:
    """Have threads do chunks of images, each from its first on, under a progress bar; they return how many it was."""
    progress = Progress(console=Console(stderr=True), transient=True, disable=count < _PROGRESS_FROM)
    with progress, ThreadPoolExecutor() as pool:
        bar = progress.add_task(f"{what} {count} images", total=count)
        for done in pool.map(do, range(0, count, _CHUNK)):  # an error cancels what has not begun
            progress.advance(bar, done)
