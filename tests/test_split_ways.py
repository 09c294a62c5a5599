"""Splits from a file, from a folder for each client, and by name; and their map, as numbers and lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import SETTING, SPLIT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_cli import METHOD

from fedlscl.cli import main
from fedlscl.data.assignment import assignment, read_assignment
from fedlscl.data.client_folders import ClientFolders
from fedlscl.data.dealing import make_split
from fedlscl.data.module import FederatedDataModule
from fedlscl.data.presets import PRESETS, preset
from fedlscl.data.source import Owners
from fedlscl.data.split_map import SplitMap, rows, short_lines
from fedlscl.data.splits import Split, SplitSpec
from fedlscl.run.configuration import Configuration

NAMES = ("ant", "bee", "cat", "c;d", "elk", "fly")
TRAIN, TEST = np.repeat(np.arange(6), 20), np.repeat(np.arange(6), 5)


def by_file(path: Path, text: str, **fields: Any) -> Split:
    path.write_text(text)
    spec = SplitSpec(**{"clients": 2, "tasks": 2, "min_public_images": 2, "by": str(path), **fields})
    return make_split(TRAIN, TEST, spec, 3, NAMES)


def classes(split: Split) -> list[list[tuple[int, ...]]]:
    return [[task.classes for task in client.tasks] for client in split.clients]


# ---- from a file


def test_a_file_says_who_has_which_classes_in_which_task(tmp_path: Path) -> None:
    split = by_file(tmp_path / "a.csv", "client,task,classes\n0,1,ant;b*\n0,2,c;d\n1,2,elk\n1,1,bee\n")
    assert classes(split) == [[(0, 1), (3,)], [(1,), (4,)]]
    assert [(client.private, client.public) for client in split.clients] == [((0, 3), (1,)), ((4,), (1,))]
    assert split.task_sizes == ((2, 1), (1, 1))
    assert split.only([1]).task_sizes == ((1, 1),)
    assert split.only([]).task_sizes == ()
    shared = [set(client.tasks[0].train.tolist()) & set(range(20, 40)) for client in split.clients]
    assert shared[0] | shared[1] == set(range(20, 40))  # every image of the class that both have, once
    assert not shared[0] & shared[1]
    assert set(split.clients[0].tasks[1].train.tolist()) == set(range(60, 80))
    assert Split.from_json(split.to_json()).sha256 == split.sha256


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), private=st.integers(0, 2), holdout=st.sampled_from(["official", "holdout30"]))
def test_what_counts_have_dealt_comes_back_from_its_file(
    tmp_path_factory: pytest.TempPathFactory, seed: int, private: int, holdout: Any
) -> None:
    """Image by image: a class that several have is dealt alike."""
    path = tmp_path_factory.mktemp("file") / "split.csv"
    counts: dict[str, Any] = {"clients": 2, "tasks": 2, "local_test": holdout, "min_public_images": 4}
    spec = SplitSpec(classes_per_task=1, private_classes=private, public_classes=2 - private, **counts)
    split = make_split(TRAIN, TEST, spec, seed, NAMES)
    path.write_text(assignment(classes(split), NAMES))
    again = make_split(TRAIN, TEST, SplitSpec(by=str(path), **counts), seed, NAMES)
    for one, other in zip(split.clients, again.clients, strict=True):
        assert one.private == other.private or private == 0
        for task, same in zip(one.tasks, other.tasks, strict=True):
            assert task.classes == same.classes
            np.testing.assert_array_equal(task.train, same.train)
            np.testing.assert_array_equal(task.test, same.test)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("client,task\n0,1\n", "line 1: there is no column classes"),
        ("client,task,classes\nx,1,ant\n", "line 2: client is 'x', must be a whole number from 0 on"),
        ("client,task,classes\n0,0,ant\n", "line 2: task is '0', must be a whole number from 1 on"),
        ("client,task,classes\n0,1,antt\n", "line 2: classes has 'antt', .*; did you mean ant?"),
        ("client,task,classes\n0,1,ant\n\n0,2,ant\n", "line 4: client 0 has class ant already in line 2"),
        ("client,task,classes\n0,1,ant\n0,2,bee\n2,1,cat\n2,2,elk\n", "client 1 is missing"),
        ("client,task,classes\n0,1,ant\n0,2,bee\n1,1,cat\n", "client 1: task 2 is missing"),
        ("client,task,classes\n0,1,ant,bee\n", "line 2: 4 cells, must be 3"),
        ("client;task;class\n0;1;ant\n0;2;bee\n", "data.split.clients and tasks are 2 and 2, but .* has 1 clients and"),
    ],
)
def test_a_file_that_is_wrong_is_told_by_line(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        by_file(tmp_path / "a.csv", text)


def test_a_file_comes_back_from_what_is_written(tmp_path: Path) -> None:
    tasks = [[[0, 3], [1]], [[5], [2, 4]]]
    (tmp_path / "a.csv").write_text("\ufeff" + assignment(tasks, NAMES), encoding="utf-8")
    assert read_assignment(tmp_path / "a.csv", 2, 2, NAMES) == tasks


# ---- from a folder for each client


def draw(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(path)


def test_every_image_is_its_owners(tmp_path: Path) -> None:
    """Client b has folders of its own for training and test; of client a's images some are drawn for the test."""
    for n in range(10):
        draw(tmp_path / "data" / "a" / "cat" / f"{n}.png", n)
        draw(tmp_path / "data" / "a" / "dog" / f"{n}.png", 20 + n)
        draw(tmp_path / "data" / "b" / "train" / "cat" / f"{n}.png", 40 + n)
        draw(tmp_path / "data" / "b" / "train" / "eel" / f"{n}.png", 60 + n)
    draw(tmp_path / "data" / "b" / "test" / "cat" / "0.png", 100)
    draw(tmp_path / "data" / "b" / "test" / "eel" / "0.png", 120)
    source = ClientFolders(str(tmp_path / "data"), 4)
    assert source.count() == 3
    split = SplitSpec(clients=2, tasks=2, by="folders")
    data = FederatedDataModule(source, split, 0, str(tmp_path / "cache"))
    data.setup()
    assert data.class_names == ("cat", "dog", "eel")
    ours: list[set[int]] = []
    for client in data.split.clients:
        found = set()
        for task in client.tasks:
            images, labels = data.batch("train", task.train)
            assert set(labels.tolist()) == set(task.classes)
            found |= set(images[:, 0, 0, 0].tolist())
        ours.append(found)
    assert len(ours[0]) == 16  # 80 % of 20
    assert max(ours[0]) < 40 <= min(ours[1])
    assert len(ours[1]) == 20
    tested = [data.batch("test", task.test)[0][:, 0, 0, 0].tolist() for task in data.split.clients[1].tasks]
    assert sorted(shade for each in tested for shade in each) == [100, 120]
    assert [(client.private, client.public) for client in data.split.clients] == [((1,), (0,)), ((2,), (0,))]
    assert data.split_map.train.tolist() == [[8, 10], [8, 0], [0, 10]]


def test_a_clients_test_images_stay_the_same_whatever_the_random_generator_gives_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for client in "ab":
        for n in range(20):
            draw(tmp_path / "data" / client / "cat" / f"{client}{n}.png", n)
    first, other = tmp_path / "first", tmp_path / "other"
    first.mkdir()
    other.mkdir()
    source = ClientFolders(str(tmp_path / "data"), 4)
    before = source.load(first)
    monkeypatch.setattr("fedlscl.data.source._CUT_SEED", 1)
    after, anew = source.load(first), source.load(other)
    assert after.sha256 == before.sha256 != anew.sha256
    assert len(list(first.glob("clientfolders-test-*.json"))) == 2  # a record for each client


def test_owners_and_by_go_together() -> None:
    owners = Owners(np.arange(120) % 3, np.arange(30) % 3)

    def deal(owners: Owners | None, **fields: Any) -> Split:
        return make_split(TRAIN, TEST, SplitSpec(**{"clients": 3, "tasks": 2, **fields}), 0, NAMES, owners)

    with pytest.raises(ValueError, match=r"data\.split\.by is null, but each of 3 clients has images in a folder"):
        deal(owners, classes_per_task=1, private_classes=0, public_classes=2)
    with pytest.raises(ValueError, match=r"data\.split\.by is folders, but these data are not in a folder for each"):
        deal(None, by="folders")
    with pytest.raises(ValueError, match=r"data\.split\.clients is 4, but the data are in folders of 3 clients"):
        deal(owners, by="folders", clients=4)
    with pytest.raises(ValueError, match=r"client 0 has no class in task 7; lower data\.split\.tasks"):
        deal(owners, by="folders", tasks=7)
    common = deal(owners, by="folders", task_order="common", tasks=3)
    assert len({task.classes for task in (client.tasks[0] for client in common.clients)}) == 1


# ---- by name


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(sorted(PRESETS)), st.integers(1, 30), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32)
)
def test_a_preset_fits_whatever_it_is_given(name: str, classes: int, clients: int, tasks: int, seed: int) -> None:
    train, test = np.repeat(np.arange(classes), 40), np.repeat(np.arange(classes), 2)
    share = classes // clients if name == "private" else classes
    if share < tasks or (name == "pathological" and clients == 1 and classes % tasks):
        with pytest.raises(ValueError, match=f"^split is '{name}': "):
            preset(name, classes, clients, tasks)
        return
    fields = preset(name, classes, clients, tasks)
    spec = SplitSpec(clients=clients, tasks=tasks, min_public_images=2, **fields)
    split = make_split(train, test, spec, seed)
    found = SplitMap.of(split, train, test, [str(label) for label in range(classes)])
    left = classes - clients * (classes // clients) if name == "private" else 0
    assert len(found.unused) == left
    sizes = {len(task.classes) for client in split.clients for task in client.tasks}
    assert max(sizes) - min(sizes) <= 1
    if name == "iid":
        assert (found.train.max(1) - found.train.min(1) <= 1).all()
    if name == "private":
        assert (found.holders <= 1).all()
    if name in ("common", "dirichlet", "iid", "public"):
        assert (found.holders == clients).all()


# ---- the map


def test_a_map_has_every_image_once_and_says_what_is_left_out() -> None:
    spec = SplitSpec(clients=2, tasks=1, classes_per_task=2, private_classes=1, public_classes=1, train_per_class=15)
    split = make_split(TRAIN, TEST, spec, 1)
    found = SplitMap.of(split, TRAIN, TEST, NAMES)
    assert found.train.sum() == 45
    assert found.train.sum() + found.left_out.sum() == len(TRAIN)
    assert found.test.sum() == 20  # two classes of five for each
    lines = list(short_lines(found, 100))
    assert lines[0] == "split: 2 clients, 1 tasks, 3 of 6 classes (2 of one client, 1 of all), 45 training images"
    assert lines[-1].startswith("  left out: 3 classes that no client has (")
    assert lines[-1].endswith("; 60 training images), and 15 training images of classes that clients have")
    assert len(lines) == 4
    cells = list(rows(found))
    assert [len(row) for row in cells] == [4] * 7
    back = SplitMap.from_json(json.loads(json.dumps(found.to_json())))
    assert list(rows(back)) == cells
    with pytest.raises(ValueError, match="not the map of a split"):
        SplitMap.from_json({"names": [], "task": [[1]]})


def test_where_nothing_is_left_out_nothing_is_said_of_it_and_many_clients_are_few_lines() -> None:
    spec = SplitSpec(
        clients=9, tasks=2, classes_per_task=3, private_classes=0, public_classes=6, task_order="common",
        min_public_images=2,
    )  # fmt: skip
    found = SplitMap.of(make_split(TRAIN, TEST, spec, 0), TRAIN, TEST, NAMES)
    lines = list(short_lines(found, 80))
    assert len(lines) == 7
    assert lines[-1].startswith("  clients 5 to 8: ")


# ---- on the command line


@pytest.fixture
def setting(tmp_path: Path, cache: Path) -> str:
    content = {**SETTING, **METHOD, "data": {**SETTING["data"], "cache_dir": str(cache)}, "federation": {"rounds": 1}}
    (tmp_path / "setting.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "setting.yaml")


@pytest.mark.usefixtures("command_line")
def test_the_split_alone_as_a_file_and_as_a_picture_and_before_a_run(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlscl.federation.algorithm.Federation.run", lambda *_: pytest.fail("trained"))
    main(["split", "--config", setting, "--out", "split.csv"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("split: 3 clients, 2 tasks, 8 of 11 classes (6 of one client, 2 of all)")
    assert len([line for line in shown if line.startswith("pattern ")]) == 11
    assert any(line.startswith("  left out: 3 classes that no client has (pattern ") for line in shown)
    assert shown[-1] == "split: split.csv"
    main(["split", "--config", setting, "--data.split.by", "split.csv", "--out", "split.png"])
    again = capsys.readouterr().out.splitlines()
    assert again[:-1] == shown[:-1]
    with Image.open("split.png") as picture:
        assert min(picture.size) > 100
    main(["fit", "--config", setting, "--dry_run", "--run_dir", "run"])
    dry = capsys.readouterr().out
    assert shown[0] in dry
    assert "fed_lscl on tiny, 2 rounds; new, in run" in dry
    assert not Path("run").exists()
    for out, complaint in (("x.txt", r"out is 'x\.txt', must end in \.png or \.csv"), ("no/x.csv", "no folder 'no'")):
        with pytest.raises(SystemExit, match=complaint):
            main(["split", "--config", setting, "--out", out])


@pytest.mark.usefixtures("command_line")
def test_a_split_by_name_is_values_of_fields_which_single_fields_override(setting: str) -> None:
    def split(*words: str) -> dict[str, Any]:
        found: dict[str, Any] = Configuration(["--config", setting, *words]).values["data"]["split"]
        return found

    assert split("--split", "dirichlet")["public_classes"] == 8  # as many as the setting's own, where nobody counts
    common = split("--split=iid", "--data.split.dirichlet_alpha", "7")
    assert (common["task_order"], common["private_classes"], common["dirichlet_alpha"]) == ("common", 0, 7)
    assert {name: common[name] for name in ("clients", "tasks")} == {name: SPLIT[name] for name in ("clients", "tasks")}
    with pytest.raises(SystemExit, match=r"split is 'diri', must be one of .*; did you mean dirichlet\?"):
        split("--split", "diri")
