"""What a process changes on the disk, seen from inside: each change is told of before it is made.

Python's own functions are wrapped, so that what compiled code writes by itself is not seen; `audited` counts the same
changes in another way (the interpreter's audit events), to find what goes past the wrappers.
"""

from __future__ import annotations

import builtins
import io
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Change(NamedTuple):
    """One change, about to be made.

    Args:
        kind: open, write, fsync, replace, unlink, mkdir or truncate.
        path: the file or folder.
        content: what is written.
        target: the new name, or where in the file or up to where.
    """

    kind: str
    path: Path
    content: bytes = b""
    target: Any = None


WRITES = ("open", "write", "replace", "mkdir")
"""The changes that need space on the disk."""


def watch(roots: list[Path], tell: Callable[[Change], None]) -> None:
    """Tell of every change below some folders from now on, in this process; what `tell` raises, the change raises."""
    below = tuple(f"{os.path.realpath(root)}{os.sep}" for root in roots)
    real_open, os_open = io.open, os.open

    def ours(path: object) -> Path | None:
        if not isinstance(path, str | bytes | os.PathLike):
            return None
        whole = os.path.abspath(os.fsdecode(path))
        return Path(whole) if f"{whole}{os.sep}".startswith(below) else None

    class Raw(io.FileIO):
        """A file that tells of what is written to it."""

        def write(self, content: Any) -> int:
            data = bytes(content)
            at = self.seek(0, os.SEEK_END) if "a" in str(self.mode) else self.tell()
            tell(Change("write", Path(os.path.abspath(str(self.name))), data, at))
            return super().write(data) or 0

    def opened(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **options: Any) -> Any:
        path = ours(file)
        if path is None or not set(mode) & set("wax+"):
            return real_open(file, mode, buffering, *rest, **options)
        tell(Change("open", path, target="w" in mode))
        raw = Raw(path, mode.replace("b", "").replace("t", ""))
        buffered: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return raw if buffering == 0 else buffered
        names = ("encoding", "errors", "newline")
        return io.TextIOWrapper(buffered, **dict(zip(names, rest, strict=False)), **options)

    def low_opened(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_CREAT and (whole := ours(path)) is not None:
            tell(Change("open", whole, target=bool(flags & os.O_TRUNC)))
        return os_open(path, flags, *rest, **options)

    def wrapped(kind: str, change: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **options: Any) -> Any:
            whole = ours(os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else path)
            if whole is not None:
                tell(Change(kind, whole, target=rest[0] if rest and kind in ("replace", "truncate") else None))
            return change(path, *rest, **options)

        return call

    builtins.open = io.open = opened
    os.open = low_opened
    for kind, names in {
        "fsync": ("fsync", "fdatasync"),
        "replace": ("replace", "rename"),
        "unlink": ("unlink", "remove"),
        "mkdir": ("mkdir",),
        "truncate": ("truncate", "ftruncate"),
    }.items():
        for name in names:
            setattr(os, name, wrapped(kind, getattr(os, name)))


AUDITED = {"os.rename": "replace", "os.remove": "unlink", "os.mkdir": "mkdir", "os.truncate": "truncate"}


def audited(roots: list[Path]) -> Counter[str]:
    """Count from now on what the interpreter says that it changes below some folders; there is no way to stop it."""
    below = tuple(f"{os.path.realpath(root)}{os.sep}" for root in roots)
    counts: Counter[str] = Counter()

    def heard(event: str, args: tuple[Any, ...]) -> None:
        kind = AUDITED.get(event)
        if event == "open" and len(args) > 2 and isinstance(args[2], int):
            kind = "open" if args[2] & (os.O_WRONLY | os.O_RDWR) else None
        if kind is not None and isinstance(args[0], str | os.PathLike):
            counts[kind] += f"{os.path.abspath(args[0])}{os.sep}".startswith(below)

    sys.addaudithook(heard)
    return counts
