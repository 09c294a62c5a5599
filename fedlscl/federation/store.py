"""The state of a federation on disk, complete at every round boundary, as safetensors and JSON.

Each tensor file is written once under a name of its own; `state.json` says which files are current, with a checksum of
each and of itself, and is replaced in one step when a round is complete. A process killed at any moment, or a power
failure, leaves the last complete round behind, and what had been begun is ignored and later removed. Nothing is used or
removed before the checksums were found right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from fedlscl.files import Damaged, content_of, is_temporary, make_folder, naming, sha256, sync, write_atomically

MANIFEST = "state.json"
FORMAT = 4  # raise it when what clients and servers keep gets other names or another meaning

_TENSORS = re.compile(r"[\w-]+\.\d+\.safetensors")


def client_name(index: int) -> str:
    """The name under which a client's state is kept."""
    return f"client-{index}"


def read(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors under `name` in the last complete round, without changing anything in `folder`.

    Raises:
        KeyError: if there is nothing under that name.
        Damaged: if a file that is needed is missing or damaged.
        ValueError: if another version of fedlscl has written the folder.
    """
    state = _manifest(folder)
    if state is None:
        _check_states(folder)
    return _load(folder, (state or _EMPTY)["files"][name])


def progress(folder: Path) -> dict[str, Any]:
    """What was committed with the last complete round, without changing anything; empty if there is none.

    Raises:
        Damaged: if the manifest is damaged.
        ValueError: if another version of fedlscl has written the folder.
    """
    found: dict[str, Any] = (_manifest(folder) or _EMPTY)["progress"]
    return found


_EMPTY: Mapping[str, Any] = {"version": 0, "files": {}, "progress": {}}


def _manifest(folder: Path) -> dict[str, Any] | None:
    """What a folder's manifest says, None if it has none."""
    path = folder / MANIFEST
    if (content := content_of(path)) is None:
        return None
    try:
        state = json.loads(content)
    except ValueError as error:
        raise _damaged(folder, [f"'{path}' is damaged"]) from error
    if not isinstance(state, dict):
        raise _damaged(folder, [f"'{path}' is damaged"])
    stated = state.pop("sha256", None)
    right = stated == _sum(state)
    found = state.get("format", 1)
    if found != FORMAT and (right or stated is None):
        raise ValueError(
            f"'{folder}' holds states in format {found}, this version of fedlscl has {FORMAT}: use the version that "
            "wrote them, or give another run_dir"
        )
    if not right:
        raise _damaged(folder, [f"'{path}' is damaged"])
    return state


def _check_states(folder: Path) -> None:
    """Refuse a folder with states and without a manifest, which says whose they are."""
    if states := sorted(path.name for path in folder.glob("*.safetensors") if _TENSORS.fullmatch(path.name)):
        raise _damaged(folder, [f"'{folder / MANIFEST}' is missing, which says what '{states[0]}' is"])


def _sum(state: Mapping[str, Any]) -> str:
    """The checksum of what a manifest says, which is the same once it was written and read."""
    return sha256(json.dumps(state).encode())


def _damaged(folder: Path, findings: list[str]) -> Damaged:
    return Damaged(f"{', '.join(findings)}: put back a copy, or delete '{folder}' to start anew")


def _contents(folder: Path, files: Iterable[tuple[str, str]]) -> Iterator[bytes]:
    """The contents of files, which are those that were written: each is given with its checksum."""
    wrong = []
    for file, expected in files:
        content = content_of(folder / file)
        if content is None or sha256(content) != expected:
            wrong.append(f"'{folder / file}' is {'missing' if content is None else 'damaged'}")
        else:
            yield content
    if wrong:
        raise _damaged(folder, wrong)


def _load(folder: Path, files: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of some files; what a later one holds replaces what an earlier one does."""
    found: dict[str, Tensor] = {}
    for content in _contents(folder, files.items()):
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        # in the order of the file; `load` has a random one, in which losses over states would be logged and summed
        found |= {key: tensors[key] for key in sorted(tensors, key=lambda key: header[key]["data_offsets"])}
    return found


class Store:
    """Named groups of tensors and the progress that belongs to them.

    Args:
        folder: created if missing; continued if it holds a complete round.

    Raises:
        Damaged: if a file of the last complete round is missing or damaged; all are named, and nothing is changed.
        ValueError: if the folder holds something else, or states of another version of fedlscl.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_folder(folder)
        state = _manifest(folder)
        if state is None:
            self._check_empty()
        self._has_manifest = state is not None
        self.version: int = (state or _EMPTY)["version"]
        self.files: dict[str, dict[str, str]] = dict((state or _EMPTY)["files"])  # by name, file and its checksum
        self.progress: dict[str, Any] = dict((state or _EMPTY)["progress"])
        self._unsaved: set[Path] = set()
        for _ in _contents(folder, self._current()):
            pass
        self._remove_others()

    def _check_empty(self) -> None:
        """Without a manifest there must be nothing but what a killed process leaves behind of writing the first one."""
        _check_states(self.folder)
        for name in sorted(path.name for path in self.folder.iterdir() if not is_temporary(path.name)):
            raise ValueError(f"'{self.folder}' holds other files ({name}); a checkpoint needs a folder of its own")

    def _current(self) -> Iterator[tuple[str, str]]:
        """The files that are needed, each with its checksum."""
        for files in self.files.values():
            yield from files.items()

    def read(self, name: str) -> dict[str, Tensor] | None:
        """The tensors last written under `name`, or None.

        Raises:
            Damaged: if a file is missing or damaged.
        """
        return _load(self.folder, self.files[name]) if name in self.files else None

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors under `name`; they count once `commit` is called."""
        self.files[name] = self._save(name, tensors)

    def rename(self, name: str, new: str) -> None:
        """Keep under `new` what was written under `name`; this counts once `commit` is called."""
        self.files[new] = self.files.pop(name)

    def forget(self, name: str) -> None:
        """Keep nothing under `name`, whether there is something or not; this counts once `commit` is called."""
        self.files.pop(name, None)

    def amend(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """As `write`, but where little has changed only that is written, beside what was written before."""
        first = dict([*self.files.get(name, {}).items()][:1])
        whole = _load(self.folder, first)
        changed = {key: tensor for key, tensor in tensors.items() if not _same(tensor, whole.get(key))}
        little = 2 * sum(t.nbytes for t in changed.values()) < sum(t.nbytes for t in tensors.values())
        if little and whole.keys() <= tensors.keys():
            self.files[name] = first | self._save(f"{name}-changes", changed)
        else:
            self.write(name, tensors)

    def _save(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Write a file; its name and checksum."""
        content = save({key: tensor.contiguous() for key, tensor in tensors.items()})
        path = self.put_aside(name, content)
        self._unsaved.add(path)
        return {path.name: sha256(content)}

    def put_aside(self, name: str, content: bytes) -> Path:
        """Write a file in the safetensors format that is there until the next `commit`, and return its path."""
        if not self._has_manifest:  # first, so that one that is missing beside other files was lost
            self._write_manifest()
        path = self.folder / f"{name}.{self.version + 1}.safetensors"
        with naming(path):
            path.write_bytes(content)  # under its own name at once: nobody asks for it before `commit`
        return path

    def commit(self, progress: Mapping[str, Any]) -> None:
        """Make all that was written, and `progress`, the current state, in one step."""
        for path in self._unsaved & {self.folder / file for file, _ in self._current()}:
            sync(path)  # at the end, since a client's state may be written twice in a round
        self._unsaved.clear()
        sync(self.folder)
        self.version += 1
        self.progress = dict(progress)
        self._write_manifest()
        self._remove_others()

    def _write_manifest(self) -> None:
        committed = self.files if self.version else {}
        state = {"format": FORMAT, "version": self.version, "files": committed, "progress": self.progress}
        write_atomically(self.folder / MANIFEST, json.dumps({**state, "sha256": _sum(state)}).encode())
        self._has_manifest = True

    def _remove_others(self) -> None:
        """Remove what an interrupted round and earlier rounds have left, and nothing that is not ours."""
        current = {file for file, _ in self._current()}
        for path in self.folder.iterdir():
            if path.name not in current and (_TENSORS.fullmatch(path.name) or is_temporary(path.name)):
                path.unlink()


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
