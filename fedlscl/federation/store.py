"""The state of a federation on disk, complete at every round boundary, as safetensors and JSON.

Each tensor file is written once under a name of its own; `state.json` says which files are current and is replaced
in one step when a round is complete. A process killed at any moment leaves the last complete round behind, and what it
had begun to write is ignored and later removed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fedlscl.files import replacing, sync, write_atomically

MANIFEST = "state.json"
FORMAT = 2  # raise it when what clients and servers keep gets other names or another meaning


_OURS = re.compile(r"[\w-]+\.\d+\.safetensors|\..+\.tmp")


def client_name(index: int) -> str:
    """The name under which a client's state is kept."""
    return f"client-{index}"


def read(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors under `name` in the last complete round, without changing anything in `folder`.

    Raises:
        KeyError: if there is nothing under that name.
        ValueError: if another version of fedlscl has written the folder.
    """
    return _load(folder, _manifest(folder)["files"][name])


def _manifest(folder: Path) -> dict[str, Any]:
    """What a folder's manifest says."""
    state: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    if (found := state.get("format", 1)) != FORMAT:
        raise ValueError(
            f"'{folder}' holds states in format {found}, this version of fedlscl has {FORMAT}: use the version that "
            "wrote them, or give another run_dir"
        )
    return state


def _load(folder: Path, files: list[str]) -> dict[str, Tensor]:
    """The tensors of some files; what a later one holds replaces what an earlier one does."""
    return {key: tensor for file in files for key, tensor in load_file(folder / file).items()}


class Store:
    """Named groups of tensors and the progress that belongs to them.

    Args:
        folder: created if missing; continued if it holds a complete round.

    Raises:
        ValueError: if the folder holds something else, or states of another version of fedlscl.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        state: dict[str, Any] = {"version": 0, "files": {}, "progress": {}}
        if (folder / MANIFEST).exists():
            state = _manifest(folder)
        elif foreign := [path.name for path in folder.iterdir() if not _OURS.fullmatch(path.name)]:
            raise ValueError(f"'{folder}' holds other files ({foreign[0]}); a checkpoint needs a folder of its own")
        self.version: int = state["version"]
        self.files: dict[str, list[str]] = state["files"]
        self.progress: dict[str, Any] = state["progress"]
        self._unsaved: set[Path] = set()
        self._remove_others()

    def read(self, name: str) -> dict[str, Tensor] | None:
        """The tensors last written under `name`, or None."""
        return _load(self.folder, self.files[name]) if name in self.files else None

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors under `name`; they count once `commit` is called."""
        self.files[name] = [self._save(name, tensors)]

    def rename(self, name: str, new: str) -> None:
        """Keep under `new` what was written under `name`; this counts once `commit` is called."""
        self.files[new] = self.files.pop(name)

    def forget(self, name: str) -> None:
        """Keep nothing under `name`, whether there is something or not; this counts once `commit` is called."""
        self.files.pop(name, None)

    def amend(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """As `write`, but where little has changed only that is written, beside what was written before."""
        whole = load_file(self.folder / self.files[name][0]) if name in self.files else {}
        changed = {key: tensor for key, tensor in tensors.items() if not _same(tensor, whole.get(key))}
        little = 2 * sum(t.nbytes for t in changed.values()) < sum(t.nbytes for t in tensors.values())
        if little and whole.keys() <= tensors.keys():
            self.files[name] = [self.files[name][0], self._save(f"{name}-changes", changed)]
        else:
            self.write(name, tensors)

    def _save(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        path = self._path(name)
        with replacing(path) as temporary:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary)
        self._unsaved.add(path)
        return path.name

    def put_aside(self, name: str, content: bytes) -> Path:
        """Write a file in the safetensors format that is there until the next `commit`, and return its path."""
        path = self._path(name)
        with replacing(path) as temporary:
            temporary.write_bytes(content)
        return path

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.{self.version + 1}.safetensors"

    def commit(self, progress: Mapping[str, Any]) -> None:
        """Make all that was written, and `progress`, the current state, in one step."""
        needed = {self.folder / file for files in self.files.values() for file in files}
        for path in self._unsaved & needed:  # at the end, since a client's state may be written twice in a round
            sync(path)
        self._unsaved.clear()
        self.version += 1
        self.progress = dict(progress)
        state = {"format": FORMAT, "version": self.version, "files": self.files, "progress": self.progress}
        write_atomically(self.folder / MANIFEST, json.dumps(state).encode())
        self._remove_others()

    def _remove_others(self) -> None:
        """Remove what an interrupted round and earlier rounds have left, and nothing that is not ours."""
        current = {MANIFEST, *(file for files in self.files.values() for file in files)}
        for path in self.folder.iterdir():
            if path.name not in current and _OURS.fullmatch(path.name):
                path.unlink()


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
