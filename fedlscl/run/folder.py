"""The files of a run: what each is called, and whether it is what the run wrote, by the checksums in its checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlscl.federation import store as checkpoint
from fedlscl.files import Damaged, content_of, is_temporary, locked, make_folder, sha256, write_atomically
from fedlscl.run.errors import TRACEBACK

log = logging.getLogger(__name__)

CONFIG, SPLIT, METRICS, SUMMARY, CHECKPOINT = "config.yaml", "split.json", "metrics.csv", "summary.json", "checkpoint"
LOCK = ".lock"


class RunFolder:
    """A run's folder.

    What a checkpoint holds of it, under `files`: the checksum of the files with which the run began and, once it is
    finished, of its summary.

    Args:
        path: where it is.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.checkpoint = path, path / CHECKPOINT

    def lock(self) -> Any:
        """A context that keeps a second process out, and makes the folder if it is missing; see `files.locked`."""
        make_folder(self.path)
        return locked(self.path / LOCK)

    def clean(self) -> None:
        """Remove what an earlier process has left behind, which only its successor may do that holds the lock."""
        for path in self.path.iterdir():
            if is_temporary(path.name) or path.name == TRACEBACK:
                path.unlink()

    def sums(self) -> dict[str, str]:
        """The checksums in the checkpoint, by name of the file; empty before the first round is complete.

        Raises:
            Damaged: if the checkpoint's manifest is damaged.
            ValueError: if another version of fedlscl has written the checkpoint.
        """
        found: dict[str, str] = checkpoint.progress(self.checkpoint).get("files", {})
        return found

    def read(self, name: str, sums: Mapping[str, str]) -> bytes | None:
        """What is in a file, None if it is missing.

        Args:
            name: the file.
            sums: what `sums` returns; a file that is not among them is not checked.

        Raises:
            Damaged: if it is not what the run wrote.
            OSError: if it is there and cannot be read.
        """
        content = content_of(self.path / name)
        if content is not None and name in sums and sha256(content) != sums[name]:
            remedy = f"put back a copy, or delete it and run `fedlscl fit` again as before, which {_ANEW[name]}"
            raise Damaged(f"'{self.path / name}' is damaged, or was changed by hand: {remedy}")
        return content

    def needed(self, name: str, sums: Mapping[str, str]) -> bytes:
        """As `read`, of a file that must be there.

        Raises:
            Damaged: if it is missing, or is not what the run wrote.
        """
        content = self.read(name, sums)
        if content is None:
            raise Damaged(
                f"'{self.path / name}' is missing: put back a copy, or run `fedlscl fit` again as before, "
                f"which {_ANEW[name]}"
            )
        return content

    def begin(self, beginning: Mapping[str, bytes], sums: Mapping[str, str]) -> dict[str, str]:
        """Write the files with which a run begins, or make sure that they are there.

        Args:
            beginning: their contents now, by name; checked with `check` before.
            sums: what `sums` returns.

        Returns:
            Their checksums, by name.
        """
        for name, content in beginning.items():
            if name not in sums or content_of(self.path / name) is None:
                write_atomically(self.path / name, content)
                if name in sums:
                    log.warning("'%s' was missing and is written anew, the same as it was", self.path / name)
        return {name: sums.get(name, sha256(content)) for name, content in beginning.items()}

    def check(self, beginning: Mapping[str, bytes], sums: Mapping[str, str]) -> None:
        """Refuse a file that is missing if it could not be written anew as it was.

        Raises:
            Damaged: naming the file.
        """
        for name, content in beginning.items():
            if name in sums and sha256(content) != sums[name] and content_of(self.path / name) is None:
                raise Damaged(
                    f"'{self.path / name}' is missing, and the run there began with another one than it would be now: "
                    f"put back a copy, give the same {_FROM[name]} as then, or another run_dir"
                )


_FROM = {CONFIG: "configuration", SPLIT: "data"}
_ANEW = {
    CONFIG: "writes it anew if the configuration is the same",
    SPLIT: "writes it anew if the data are the same",
    SUMMARY: f"makes it anew from {CHECKPOINT}/",
}
