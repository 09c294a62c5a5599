"""The store: whatever moment a process dies at, the next one finds the last complete round and nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from fedlscl import files
from fedlscl.federation.store import MANIFEST, Store, read
from fedlscl.files import Damaged, write_atomically


def numbers(value: float) -> dict[str, Tensor]:
    return {"weight": torch.full((2, 3), value), "steps": torch.tensor(int(value)), "buffer": torch.empty(0).long()}


def value_of(store: Store, name: str) -> float | None:
    tensors = store.read(name)
    return None if tensors is None else float(tensors["weight"][0, 0])


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    """A folder with a complete round: client-0 is 1, client-1 is 2."""
    store = Store(tmp_path / "state")
    store.write("client-0", numbers(1))
    store.write("client-1", numbers(2))
    store.commit({"round": 1})
    return tmp_path / "state"


def assert_as_committed(folder: Path) -> None:
    store = Store(folder)
    assert store.progress == {"round": 1}
    assert (value_of(store, "client-0"), value_of(store, "client-1")) == (1, 2)
    assert store.read("client-2") is None
    assert listing(folder) == {MANIFEST, *(file for files in store.files.values() for file in files)}
    assert len(listing(folder)) == 3


# --------------------------------------------------------------- in good order


def test_a_name_is_changed_or_forgotten_with_the_next_commit(committed: Path) -> None:
    store = Store(committed)
    store.rename("client-0", "client-2")
    store.forget("client-1")
    store.forget("client-7")
    assert [value_of(store, f"client-{n}") for n in range(3)] == [None, None, 1]
    assert_as_committed(committed)  # for whoever comes before the commit
    store.commit({"round": 2})
    again = Store(committed)
    assert [value_of(again, f"client-{n}") for n in range(3)] == [None, None, 1]
    assert listing(committed) == {MANIFEST, *again.files["client-2"]}
    with pytest.raises(KeyError):
        again.rename("client-0", "client-3")


def test_what_was_renamed_is_amended_beside_it(committed: Path) -> None:
    store = Store(committed)
    store.rename("client-0", "client-2")
    large = {**numbers(1), "large": torch.ones(100)}
    store.write("client-2-new", large)
    store.rename("client-2-new", "client-2")
    store.amend("client-2", {**large, **numbers(5)})
    store.commit({"round": 2})
    assert len(Store(committed).files["client-2"]) == 2
    assert value_of(Store(committed), "client-2") == 5


def test_an_empty_store(tmp_path: Path) -> None:
    store = Store(tmp_path / "a" / "b")
    assert store.progress == {}
    assert store.read("client-0") is None
    assert listing(tmp_path / "a" / "b") == set()


def test_what_was_written_is_read_by_this_process_and_the_next(tmp_path: Path) -> None:
    store = Store(tmp_path)
    sent = {
        "half": torch.tensor([1.5, -2], dtype=torch.float16),
        "view": torch.arange(6.0).view(2, 3).T,
        "count": torch.tensor(2**40),
        "empty": torch.empty(0, dtype=torch.int64),
        "mask": torch.tensor([True, False]),
    }
    store.write("client-0", sent)
    store.commit({"round": 4, "accuracy": [[71.2, None]]})
    for reader in (store, Store(tmp_path)):
        got = reader.read("client-0")
        assert got is not None
        assert set(got) == set(sent)
        for name, tensor in sent.items():
            assert got[name].dtype == tensor.dtype
            assert torch.equal(got[name], tensor)
        assert reader.progress == {"round": 4, "accuracy": [[71.2, None]]}


def test_a_round_replaces_what_it_wrote_and_keeps_the_rest(committed: Path) -> None:
    store = Store(committed)
    store.write("client-0", numbers(10))
    assert value_of(store, "client-0") == 10
    store.write("client-0", numbers(11))  # twice in a round: after the fit and after the answer
    assert value_of(store, "client-0") == 11
    store.commit({"round": 2})
    again = Store(committed)
    assert again.progress == {"round": 2}
    assert (value_of(again, "client-0"), value_of(again, "client-1")) == (11, 2)
    assert len(listing(committed)) == 3


def test_rounds_do_not_pile_up(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for round in range(1, 6):
        for client in range(3):
            store.write(f"client-{client}", numbers(10 * round + client))
        store.commit({"round": round})
        assert len(listing(tmp_path)) == 4
    assert [value_of(Store(tmp_path), f"client-{client}") for client in range(3)] == [50, 51, 52]


SIZES = {"large": 100, "small": 4, "other": 7}
STATES = st.dictionaries(st.sampled_from(sorted(SIZES)), st.integers(0, 2), min_size=1)


@given(st.lists(st.tuples(st.sampled_from(["write", "amend", "commit", "restart"]), STATES), max_size=12))
@settings(max_examples=60, deadline=None)
def test_an_amended_state_is_read_as_if_it_had_been_written(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[str, dict[str, int]]]
) -> None:
    folder = tmp_path_factory.mktemp("store")
    store = Store(folder)
    written: dict[str, int] | None = None
    committed: dict[str, int] | None = None
    for action, values in actions:
        tensors = {name: torch.full((SIZES[name],), value) for name, value in values.items()}
        if action == "restart":
            store, written = Store(folder), committed
        elif action == "commit":
            store.commit({})
            committed = written
        else:
            (store.write if action == "write" else store.amend)("client-0", tensors)
            written = values
        got = store.read("client-0")
        assert (got and {name: int(tensor.unique()) for name, tensor in got.items()}) == written
        assert got is None or all(len(tensor) == SIZES[name] for name, tensor in got.items())
    store.commit({})
    assert len(listing(folder)) == 1 + len(store.files.get("client-0", []))


def test_an_amendment_is_as_small_as_what_has_changed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("client-0", {"cnn": torch.zeros(10_000), "generator": torch.zeros(10)})
    store.commit({})
    for value in (1, 2):  # always what differs from the whole, however often it is amended
        store.amend("client-0", {"cnn": torch.zeros(10_000), "generator": torch.full((10,), float(value))})
        store.commit({})
        sizes = sorted(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
        assert len(sizes) == 2
        assert sizes[0] < 400
        assert sizes[1] > 40_000
        got = Store(tmp_path).read("client-0")
        assert got is not None
        assert float(got["generator"][0]) == value
    store.write("client-0", {"cnn": torch.ones(10_000)})
    store.commit({})
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_nothing_but_safetensors_and_json_is_kept(committed: Path) -> None:
    for path in committed.iterdir():
        if path.name == MANIFEST:
            assert set(json.loads(path.read_text())) == {"format", "version", "files", "progress", "sha256"}
        else:
            assert path.suffix == ".safetensors"
            with safe_open(path, framework="pt") as file:
                assert set(file.keys()) == {"weight", "steps", "buffer"}


def test_progress_is_a_copy_of_what_was_given(tmp_path: Path) -> None:
    store, progress = Store(tmp_path), {"round": 1}
    store.commit(progress)
    progress["round"] = 99
    assert store.progress == {"round": 1}


def test_reading_beside_a_run_changes_nothing(committed: Path) -> None:
    Store(committed).write("client-0", numbers(10))  # of a round that is not complete
    before = listing(committed)
    assert float(read(committed, "client-0")["weight"][0, 0]) == 1
    assert listing(committed) == before
    with pytest.raises(KeyError, match="client-7"):
        read(committed, "client-7")


# --------------------------------------------------------------- killed on the way


def test_what_is_put_aside_is_gone_after_the_round_and_after_a_kill(committed: Path) -> None:
    store = Store(committed)
    path = store.put_aside("upload-3", b"anything")
    assert path.read_bytes() == b"anything"
    store.write("client-0", numbers(5))
    store.commit({"round": 2})
    assert not path.exists()
    assert value_of(store, "client-0") == 5
    path = store.put_aside("upload-3", b"something else")
    assert store.read("upload-3") is None  # it is no state
    Store(committed)
    assert not path.exists()


def test_killed_between_write_and_commit(committed: Path) -> None:
    store = Store(committed)
    store.write("client-0", numbers(10))
    store.write("client-2", numbers(30))
    assert len(listing(committed)) == 5
    assert_as_committed(committed)


def test_killed_in_the_middle_of_a_write(committed: Path) -> None:
    (committed / ".client-0.2.safetensors.4711.tmp").write_bytes(b"half a fi")
    (committed / "client-1.2.safetensors").write_bytes(b"")
    (committed / f".{MANIFEST}.4711.tmp").write_bytes(b'{"version": 2, "fi')
    assert_as_committed(committed)


@pytest.mark.parametrize("step", ["before", "after"])
def test_killed_in_the_commit(committed: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Until the manifest is replaced the old round counts, from then on the new one."""
    store = Store(committed)
    store.write("client-0", numbers(10))
    replace = os.replace

    def die(source: Path, target: Path) -> None:
        if step == "after":
            replace(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        store.commit({"round": 2})
    monkeypatch.undo()
    if step == "before":
        assert_as_committed(committed)
    else:
        again = Store(committed)
        assert again.progress == {"round": 2}
        assert (value_of(again, "client-0"), value_of(again, "client-1")) == (10, 2)
        assert len(listing(committed)) == 3


def test_after_a_kill_the_round_is_done_again(committed: Path) -> None:
    Store(committed).write("client-0", numbers(666))
    store = Store(committed)
    store.write("client-0", numbers(10))
    store.commit({"round": 2})
    assert value_of(Store(committed), "client-0") == 10
    assert len(listing(committed)) == 3


def test_a_committed_file_is_never_written_to(committed: Path) -> None:
    before = {path.name: path.read_bytes() for path in committed.iterdir()}
    store = Store(committed)
    for value in (10, 11):
        store.write("client-0", numbers(value))
        store.write("client-1", numbers(value))
    assert {name: (committed / name).read_bytes() for name in before} == before


# ---------------------------------------------------------------- atomic writes


def test_an_atomic_write_replaces_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert listing(tmp_path) == {"summary.json"}


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: type[BaseException]
) -> None:
    path = tmp_path / "summary.json"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(files.os, call, fail)
    with pytest.raises(error):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert listing(tmp_path) == {"summary.json"}


def test_the_content_is_on_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(
            files.os, name, lambda *args, name=name, original=original: (calls.append(name), original(*args))
        )
    write_atomically(tmp_path / "file", b"content")
    assert calls[:2] == ["fsync", "replace"]


@pytest.mark.parametrize("written", [None, 1, 3, 5])
def test_states_of_another_version_are_refused(tmp_path: Path, written: int | None) -> None:
    """What they are called may mean something else, or nothing, which would be lost without a word."""
    store = Store(tmp_path / "store")
    store.write("client-0", {"x": torch.ones(1)})
    store.commit({"round": 1})
    path = tmp_path / "store" / "state.json"
    state = json.loads(path.read_text())
    del state["format"], state["sha256"]  # which other versions may not have
    path.write_text(json.dumps(state if written is None else {**state, "format": written}))
    for use in (lambda: Store(tmp_path / "store"), lambda: read(tmp_path / "store", "client-0")):
        with pytest.raises(ValueError, match=rf"holds states in format {written or 1}, this version of fedlscl has 4"):
            use()


# ------------------------------------------------------------------------------ checksums


def test_a_damaged_file_is_named_and_nothing_is_removed(committed: Path) -> None:
    path = committed / "client-0.1.safetensors"
    content = path.read_bytes()
    Store(committed).write("client-1", numbers(20))  # of a round that is not complete
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        before = listing(committed)
        for use in (lambda: Store(committed), lambda: read(committed, "client-0")):
            with pytest.raises(Damaged, match=r"client-0\.1\.safetensors' is damaged: put back a copy, or delete '"):
                use()
        assert listing(committed) == before
    assert value_of_other(committed) == 2


def value_of_other(folder: Path) -> float:
    return float(read(folder, "client-1")["weight"][0, 0])


def test_every_missing_file_is_named(committed: Path) -> None:
    for client in range(2):
        (committed / f"client-{client}.1.safetensors").unlink()
    with pytest.raises(Damaged, match=r"client-0\S+ is missing, '\S+client-1\S+ is missing: put back"):
        Store(committed)


def test_a_file_that_is_damaged_while_the_run_goes_on_is_not_used(committed: Path) -> None:
    store = Store(committed)
    (committed / "client-0.1.safetensors").write_bytes(b"")
    with pytest.raises(Damaged, match=r"client-0\.1\.safetensors' is damaged"):
        store.read("client-0")
    with pytest.raises(Damaged, match=r"client-0\.1\.safetensors' is damaged"):
        store.amend("client-0", numbers(2))


def test_one_bit_in_the_manifest_deletes_nothing_and_starts_nobody_anew(committed: Path) -> None:
    path = committed / MANIFEST
    content = path.read_bytes()
    before = listing(committed)
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        with pytest.raises(Damaged, match=r"state\.json' is damaged: put back a copy, or delete '"):
            Store(committed)
        assert listing(committed) == before
    for cut in (b"", b"{", content[:-1], b"[]", b"null", content + b"}"):
        path.write_bytes(cut)
        with pytest.raises(Damaged, match=r"state\.json' is damaged"):
            Store(committed)
    path.write_bytes(content)
    assert_as_committed(committed)


def test_a_lost_manifest_is_not_an_empty_folder(committed: Path) -> None:
    (committed / MANIFEST).unlink()
    with pytest.raises(Damaged, match=r"state\.json' is missing, which says what 'client-0\.1\.safetensors' is"):
        Store(committed)
    assert len(listing(committed)) == 2


def test_what_a_kill_leaves_of_the_first_round_is_no_lost_manifest(tmp_path: Path) -> None:
    Store(tmp_path).write("client-0", numbers(1))
    assert listing(tmp_path) == {MANIFEST, "client-0.1.safetensors"}
    again = Store(tmp_path)
    assert (again.read("client-0"), again.progress) == (None, {})
    assert listing(tmp_path) == {MANIFEST}


@pytest.mark.parametrize("name", [".tmpAbCdEf", ".state.json.123.tmp"])
def test_temporary_files_of_whatever_origin_are_removed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"half a fi")
    Store(tmp_path)
    assert listing(tmp_path) == set()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".tmpAbCdEf").touch()
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds other files \(thesis\.tex\)"):
        Store(tmp_path)
    assert listing(tmp_path) == {".tmpAbCdEf", "thesis.tex"}


def test_a_round_is_on_the_disk_before_its_manifest_is(committed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, calls = Store(committed), list[str]()
    for name in ("fsync", "replace", "unlink"):
        original = getattr(os, name)

        def noted(path: int | str | Path, *rest: object, name: str = name, original: object = original) -> None:
            at = Path(os.readlink(f"/proc/self/fd/{path}")) if isinstance(path, int) else Path(path)
            calls.append(f"{name} {at.name.partition('.')[0] or 'manifest'}")
            original(path, *rest)  # type: ignore[operator]

        monkeypatch.setattr(os, name, noted)
    store.write("client-0", numbers(3))
    store.commit({})
    expected = ["fsync client-0", "fsync state", "fsync manifest", "replace manifest", "fsync state", "unlink manifest"]
    assert calls == [*expected, "unlink client-0"]


def test_tensors_come_in_the_order_of_their_file(tmp_path: Path) -> None:
    """Sums over a state, and what is logged of it, depend on the order; safetensors itself has a random one."""
    store = Store(tmp_path)
    store.write("client-0", {name: torch.ones(n + 1) for n, name in enumerate("hgfedcba")})
    for _ in range(5):
        assert list(store.read("client-0") or {}) == [*"abcdefgh"]
