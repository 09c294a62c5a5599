"""Shares: every place has its own images, all of them, in the same order, and nobody else's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import SETTING, make_data
from test_cli import METHOD

from fedlscl.cli import main
from fedlscl.data.module import FederatedDataModule
from fedlscl.data.splits import Split, SplitSpec, TaskSplit
from fedlscl.deployment.shares import LocalShare, deal
from fedlscl.files import Damaged

OTHER_SPLITS: list[dict[str, Any]] = [
    {},
    {"local_test": "holdout30"},
    {"train_per_class": 9, "test_per_class": 2, "dirichlet_alpha": 0.5, "min_public_images": 1},
]


@pytest.fixture(params=OTHER_SPLITS, ids=["all", "holdout30", "few"])
def whole(request: pytest.FixtureRequest, cache: Path) -> FederatedDataModule:
    return make_data(cache, **request.param)


def opened(folder: Path) -> LocalShare:
    share = LocalShare(folder)
    share.prepare_data()
    share.setup()
    return share


def indices(task: TaskSplit, split: Split) -> list[tuple[Any, np.ndarray[Any, Any]]]:
    return [("train", task.train), (split.evaluate_on, task.test)]


def swap(tasks: list[dict[str, Any]], part: str) -> None:
    tasks[0][part], tasks[1][part] = tasks[1][part], tasks[0][part]


def test_a_client_finds_its_own_images_where_they_were(whole: FederatedDataModule, tmp_path: Path) -> None:
    folders = list(deal(whole, 0, tmp_path))
    assert [folder.name for folder in folders] == ["client-0", "client-1", "client-2", "server"]
    for index, client in enumerate(whole.split.clients):
        share = opened(tmp_path / f"client-{index}")
        assert share.class_names == whole.class_names
        assert share.split_sha256 == whole.split_sha256
        assert share.split.spec == whole.split.spec
        assert share.split.evaluate_on == whole.split.evaluate_on
        own = share.split.clients[index]
        assert (own.private, own.public) == (client.private, client.public)
        used: dict[str, int] = {"train": 0, "test": 0}
        for mine, task in zip(own.tasks, client.tasks, strict=True):
            assert mine.classes == task.classes
            pairs = zip(indices(mine, share.split), indices(task, whole.split), strict=True)
            for (part, here), (_, there) in pairs:
                for one, other in zip(share.batch(part, here), whole.batch(part, there), strict=True):
                    assert torch.equal(one, other)
                assert list(np.argsort(here)) == list(np.argsort(there))
                used[part] += len(here)
        # and no other image is there
        assert {part: len(getattr(share.dataset, part).labels) for part in used} == used
        assert [n for n, other in enumerate(share.split.clients) if other.tasks] == [index]


def test_the_server_holds_public_images_alone(whole: FederatedDataModule, tmp_path: Path) -> None:
    *_, folder = deal(whole, 2, tmp_path)
    server = opened(folder)
    assert server.split.present == ()
    for one, other in zip(server.server_images(2), whole.server_images(2), strict=True):
        assert torch.equal(one, other)
    assert len(server.dataset.test.labels) == 0
    with pytest.raises(ValueError, match="server holds 2 images of each class for the server, server wants 3"):
        server.server_images(3)
    *_, folder = deal(whole, 0, tmp_path / "none")
    assert len(opened(folder).dataset.train.labels) == 0
    assert opened(folder).dataset.train.images.shape[1:] == whole.dataset.train.images.shape[1:]


def test_a_share_that_is_not_complete_is_none(whole: FederatedDataModule, tmp_path: Path) -> None:
    """share.json comes last."""
    shares = deal(whole, 0, tmp_path)
    next(shares)
    shares.close()  # type: ignore[attr-defined]
    opened(tmp_path / "client-0")
    with pytest.raises(FileNotFoundError, match=r"client-1 holds no share of a federation's data"):
        LocalShare(tmp_path / "client-1")


def test_what_a_place_knows_of_a_split_survives_json(whole: FederatedDataModule) -> None:
    for clients in ([], [1], [0, 2]):
        part = whole.split.only(clients)
        assert Split.from_json(part.to_json()).to_json() == part.to_json()
        assert [n for n, client in enumerate(part.clients) if client in part.present] == clients
    assert whole.split.only([0, 1, 2]).sha256 == whole.split.sha256


def test_the_rules_hold_for_those_who_are_there(whole: FederatedDataModule) -> None:
    content = json.loads(whole.split.only([1]).to_json())
    content["clients"][1]["tasks"][0]["train"] = content["clients"][1]["tasks"][1]["train"]
    with pytest.raises(ValueError, match=r"training images: .* used more than once"):
        Split.from_json(json.dumps(content))


def test_a_share_written_by_hand_as_the_documentation_says(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "experiments/flower/README.md").read_text()
    (tmp_path / "share.json").write_text(page.split("```json")[1].split("```")[0])
    images = np.arange(8 * 3 * 5 * 5).reshape(8, 3, 5, 5).astype(np.uint8)
    labels = np.array([4, 4, 5, 5, 6, 6, 7, 7])
    for part, held in (("train", slice(None)), ("test", slice(None, None, 2))):
        np.save(tmp_path / f"{part}-images.npy", images[held])
        np.save(tmp_path / f"{part}-labels.npy", labels[held])
    share = opened(tmp_path)
    assert share.split_spec == SplitSpec(2, 2, 2, 4, 0)
    assert share.split.federation == ((0, 1, 4, 5), (2, 3, 6, 7))
    assert [bool(client.tasks) for client in share.split.clients] == [False, True]
    for task in share.split.clients[1].tasks:
        for part, positions in indices(task, share.split):
            _, found = share.batch(part, positions)
            assert {share.class_names[label] for label in found} == {share.class_names[label] for label in task.classes}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda share, _: share.pop("classes"), r"share.json: it lacks \['classes'\]"),
        (lambda share, _: share.update(files=3), "share.json: files is 3, must be the checksum of each array"),
        (lambda share, _: share["split"].pop("seed"), r"share.json: not a split .*\['clients', 'federation', 'spec'\]"),
        (lambda _, tasks: tasks[1].update(classes=[0, 1]), "share.json: not a split .*client 0: classes of all tasks"),
        (lambda _, tasks: tasks[0]["train"].append(5000), "task 1 has position 5000 in train-images of"),
        (lambda _, tasks: tasks[0].update(test=tasks[1]["test"]), "client 0: test images: .* used more than once"),
        (lambda _, tasks: swap(tasks, "test"), r"task 1 has classes \[.*\], but test images of \{"),
    ],
)
def test_a_share_that_is_wrong_is_refused(
    cache: Path, tmp_path: Path, change: Callable[[dict[str, Any], list[dict[str, Any]]], object], complaint: str
) -> None:
    folder = next(deal(make_data(cache), 0, tmp_path))
    content = json.loads((folder / "share.json").read_text())
    change(content, content["split"]["clients"][0]["tasks"])
    (folder / "share.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=complaint):
        opened(folder)


@pytest.mark.parametrize("name", ["train-images.npy", "train-labels.npy", "test-images.npy", "test-labels.npy"])
@pytest.mark.parametrize("at", [3, 20, -1])
def test_a_damaged_array_is_named(cache: Path, tmp_path: Path, name: str, at: int) -> None:
    folder = next(deal(make_data(cache), 0, tmp_path))
    content = bytearray((folder / name).read_bytes())
    content[at] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(Damaged, match=f"{name}' is damaged: put back a copy, or deal the data again"):
        opened(folder)


def test_what_is_no_array_is_told(cache: Path, tmp_path: Path) -> None:
    """In a share that somebody else has written, of which nobody knows the checksums."""
    folder = next(deal(make_data(cache), 0, tmp_path))
    content = json.loads((folder / "share.json").read_text())
    del content["files"]
    (folder / "share.json").write_text(json.dumps(content))
    good = (folder / "train-images.npy").read_bytes()
    for bad in (b"", b"text", good[:30] + bytes(len(good) - 30)):
        (folder / "train-images.npy").write_bytes(bad)
        with pytest.raises(ValueError, match=r"train-images.npy' is not an array of NumPy"):
            opened(folder)


@pytest.mark.usefixtures("command_line")
def test_the_command_deals(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {**SETTING, **METHOD, "data": {**SETTING["data"], "cache_dir": str(cache)}}
    (tmp_path / "setting.yaml").write_text(yaml.safe_dump(content))
    main(["deal", "shares", "--config", "setting.yaml", "--seed_everything", "3"])
    places = ("client-0", "client-1", "client-2", "server")
    assert capsys.readouterr().out.split() == [f"shares/{name}" for name in places]
    assert opened(Path("shares/client-2")).split.seed == 3
    assert not Path("runs").exists()
    for words in ([], ["--config", "setting.yaml"]):
        with pytest.raises(SystemExit, match="deal needs a folder to write into"):
            main(["deal", *words])
