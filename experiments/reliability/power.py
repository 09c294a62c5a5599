"""What is on a disk after the power has failed, by what was written and what was forced onto it.

The model: what a file holds is certain up to its last fsync, and the names in a folder up to the folder's last fsync.
What came after is lost, or there, or there in part: `Disk.left` makes one of these up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from reliability.changes import Change


@dataclass
class _File:
    now: bytes = b""
    certain: bytes = b""


def _middle(file: _File) -> int:
    return (len(file.certain) + len(file.now)) // 2


@dataclass
class _Folder:
    now: dict[str, _File | _Folder] = field(default_factory=dict)
    certain: dict[str, _File | _Folder] = field(default_factory=dict)
    pending: list[tuple[str, _File | _Folder | None]] = field(default_factory=list)

    def put(self, name: str, what: _File | _Folder | None) -> None:
        """A name is given, or taken away."""
        self.pending.append((name, what))
        if what is None:
            self.now.pop(name, None)
        else:
            self.now[name] = what


MODES = ("all that was not synced is lost", "names are there, contents are not", "any part of it is there")


class Disk:
    """Follows the changes below a folder that is there already, and empty."""

    def __init__(self, root: Path) -> None:
        self.root, self.top = root, _Folder()

    def apply(self, change: Change) -> None:
        """Note a change that was made."""
        parts = change.path.relative_to(self.root).parts
        folder = self._folder(parts[:-1])
        name = parts[-1] if parts else ""
        if change.kind == "fsync":
            what = folder.now.get(name) if parts else self.top
            if isinstance(what, _Folder):
                what.certain, what.pending = dict(what.now), []
            elif what is not None:
                what.certain = what.now
        elif change.kind == "mkdir":
            if name not in folder.now:
                folder.put(name, _Folder())
        elif change.kind == "unlink":
            if name in folder.now:
                folder.put(name, None)
        elif change.kind == "replace":
            target = Path(change.target).relative_to(self.root).parts
            what = folder.now[name]
            self._folder(target[:-1]).put(target[-1], what)
            folder.put(name, None)
        else:
            self._written(folder, name, change)

    def _written(self, folder: _Folder, name: str, change: Change) -> None:
        if name not in folder.now:
            folder.put(name, _File())
        file = folder.now[name]
        assert isinstance(file, _File)
        if change.kind == "open" and change.target:
            file.now = b""
        elif change.kind == "truncate":
            file.now = file.now[: change.target]
        elif change.kind == "write":
            file.now = file.now[: change.target].ljust(change.target, b"\0") + change.content

    def _folder(self, parts: tuple[str, ...]) -> _Folder:
        folder = self.top
        for part in parts:
            below = folder.now[part]
            assert isinstance(below, _Folder)
            folder = below
        return folder

    def left(self, mode: int, rng: Random) -> dict[str, bytes | None]:
        """What is found again, by path: the contents of files, None for folders.

        Args:
            mode: one of `MODES`, by its number.
            rng: decides where there is a choice.
        """
        found: dict[str, bytes | None] = {}

        def gather(folder: _Folder, prefix: str) -> None:
            names = dict(folder.now if mode == 1 else folder.certain)
            if mode == 2:
                for name, what in folder.pending[: rng.randint(0, len(folder.pending))]:
                    names.pop(name, None)
                    if what is not None:
                        names[name] = what
            for name, what in names.items():
                path = f"{prefix}{name}"
                if isinstance(what, _Folder):
                    found[path] = None
                    gather(what, f"{path}/")
                elif mode == 2 and what.now.startswith(what.certain):  # at most the end is uncertain
                    found[path] = what.now[: rng.choice((len(what.certain), len(what.now), _middle(what)))]
                elif mode == 2:
                    found[path] = rng.choice((what.certain, what.now, what.now[: len(what.now) // 2], b""))
                else:
                    found[path] = what.certain

        gather(self.top, "")
        return found
