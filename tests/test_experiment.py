"""One run folder: what is in it, what its numbers mean, and that nothing but the time differs after an interruption."""

from __future__ import annotations

import fcntl
import io
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import CNN, VIT, Patterns, lasting, lasting_rows, make_client, make_trainer, rows
from rich.console import Console
from safetensors.torch import save_file

from fedlscl.analysis.results import read_runs
from fedlscl.client import Client
from fedlscl.data.module import FederatedDataModule
from fedlscl.data.source import Dataset
from fedlscl.evaluation import MASKS
from fedlscl.federation import store as checkpoint
from fedlscl.federation.callback import RoundResult
from fedlscl.files import sha256
from fedlscl.methods.fed_lscl import ExactO2D, FedLSCL
from fedlscl.models.cnn import SmallModel, SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.run.callback import RunCallback, measured, together
from fedlscl.run.experiment import Experiment, ImpossibleRun, StoppedRun, Tracking, accuracy_arrays, differences
from fedlscl.run.summary import Skipped, Summary
from fedlscl.schedule import Schedule

Make = Callable[..., Experiment]


def maker(folder: Path, data: FederatedDataModule, vit: FrozenViT) -> Make:
    """Describe experiments of four rounds below a folder."""
    above = folder

    def build(folder: str = "run", **changes: Any) -> Experiment:
        parts: dict[str, Any] = {
            "setting": "tiny",
            "method": "fed_lscl",
            "seed": 0,
            "config": {"setting": "tiny", "model": {"class_path": "FedLSCL", "init_args": {"epochs": 1}}},
            "run_dir": above / folder,
            "schedule": Schedule(2),
            "client": make_client(),
            "server": ExactO2D(),
            "data": data,
            "vit": vit,
            "cnn": SmallModelSpec(**CNN),
            "trainer": make_trainer,
            "tracking": Tracking(wandb_mode="disabled"),
        }
        return Experiment(**{**parts, **changes})

    return build


@pytest.fixture
def make(tmp_path: Path, data: FederatedDataModule, vit: FrozenViT) -> Make:
    return maker(tmp_path, data, vit)


def console() -> Console:
    return Console(file=io.StringIO(), width=150)


def text(to: Console) -> str:
    assert isinstance(to.file, io.StringIO)
    return " ".join(to.file.getvalue().split())


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, data: FederatedDataModule, vit: FrozenViT
) -> tuple[Experiment, Summary]:
    """An uninterrupted run of four rounds, and its summary."""
    folder = tmp_path_factory.mktemp("finished")
    experiment: Experiment = maker(folder, data, vit)()
    return experiment, experiment.run(console())


# ---- what a run leaves behind


def test_a_run_folder_holds_what_was_promised(finished: tuple[Experiment, Summary]) -> None:
    experiment, _ = finished
    found = {path.name for path in experiment.run_dir.iterdir() if not path.name.startswith(".")}
    pictures = {"split.png", "accuracy_over_rounds.png", *(f"accuracy_matrix_{mask}.png" for mask in MASKS)}
    assert found == {"config.yaml", "split.json", "metrics.csv", "summary.json", "checkpoint", *pictures}
    for name in pictures:
        assert (experiment.run_dir / name).read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load((experiment.run_dir / "config.yaml").read_text()) == experiment.config
    assert not list(experiment.run_dir.rglob("*.tmp"))
    kept = [path.suffix for path in (experiment.run_dir / "checkpoint").iterdir()]
    assert sorted(set(kept)) == [".json", ".safetensors"]


def test_the_summary_holds_what_was_promised(finished: tuple[Experiment, Summary]) -> None:
    experiment, summary = finished
    assert summary == Summary.read(experiment.run_dir / "summary.json")
    assert (summary.setting, summary.method, summary.seed) == ("tiny", "fed_lscl", 0)
    assert "vit_tiny_patch16_224" in summary.backbone
    assert set(summary.accuracy) == set(MASKS)
    for metrics in summary.accuracy.values():
        assert len(metrics.table1) == 2
        for name in ("final_average", "average_incremental"):
            assert 0 <= getattr(metrics, name) <= 100
        for name in ("forgetting", "backward_transfer"):
            assert -100 <= getattr(metrics, name) <= 100
    assert summary.split_sha256 == experiment.data.split.sha256
    assert summary.data_sha256 == experiment.data.dataset.sha256
    assert summary.weights_sha256 is None  # the ViT here is of no file
    assert (summary.tested_pairs, summary.untrained_pairs) == (3 * 4, 0)
    assert summary.skipped == ()
    assert summary.task_aware == ()
    assert summary.seconds["total"] >= sum(summary.seconds[phase] for phase in ("fit", "aggregate", "evaluate"))
    assert summary.peak_memory_mib > 1
    assert torch.__version__.startswith(summary.versions["torch"])


def test_bytes_add_up(finished: tuple[Experiment, Summary]) -> None:
    experiment, summary = finished
    for way in ("bytes_up", "bytes_down"):
        by_round = np.array(getattr(summary, way).by_round)
        assert by_round.shape == (4, 3)
        assert getattr(summary, way).total == by_round.sum()
        assert list(getattr(summary, way).by_client) == by_round.sum(axis=0).tolist()
        assert getattr(summary, way).per_client_round == by_round.mean()
        recorded = {
            (int(row["round"]), int(row["metric"].split("/")[1])): float(row["value"])
            for row in rows(experiment.run_dir)
            if row["metric"].endswith(f"/{way}")
        }
        assert recorded == {(r + 1, c): by_round[r, c] for r in range(4) for c in range(3)}
    # phi and its frame alone need this much
    assert (np.array(summary.bytes_down.by_round) > 4 * (16 + 1) * 4 * 2 * 32).all()


def test_the_published_numbers_follow_from_the_metrics(finished: tuple[Experiment, Summary]) -> None:
    experiment, summary = finished
    measured: dict[str, dict[tuple[int, int, int], float]] = defaultdict(dict)
    for row in rows(experiment.run_dir):
        match row["metric"].split("/"):
            case ["eval", mask, "client", client, "task", task] if int(row["round"]) % 2 == 0:
                measured[mask][int(client), int(row["task"]), int(task)] = float(row["value"])
    for mask in MASKS:
        a = measured[mask]
        assert set(a) == {(c, n, m) for c in range(3) for n in (1, 2) for m in range(1, n + 1)}

        def mean(values: list[float]) -> float:
            return sum(values) / len(values)

        got = summary.accuracy[mask]
        clients = range(3)
        assert got.table1 == pytest.approx([mean([a[c, n, n] for c in clients]) for n in (1, 2)])
        assert got.final_average == pytest.approx(mean([(a[c, 2, 1] + a[c, 2, 2]) / 2 for c in clients]))
        assert got.average_incremental == pytest.approx(
            mean([(a[c, 1, 1] + (a[c, 2, 1] + a[c, 2, 2]) / 2) / 2 for c in clients])
        )
        assert got.forgetting == pytest.approx(mean([a[c, 1, 1] - a[c, 2, 1] for c in clients]))
        assert got.backward_transfer == pytest.approx(mean([a[c, 2, 1] - a[c, 1, 1] for c in clients]))
        assert got.matrix == tuple(((a[c, 1, 1], None), (a[c, 2, 1], a[c, 2, 2])) for c in clients)
        (last,) = [r for r in rows(experiment.run_dir) if r["metric"] == f"eval/{mask}/mean" and r["round"] == "4"]
        assert float(last["value"]) == pytest.approx(got.final_average)
        finals = [r for r in rows(experiment.run_dir) if r["metric"] == f"task/{mask}/final_average"]
        assert [(r["task"], r["round"]) for r in finals] == [("1", "2"), ("2", "4")]
        assert float(finals[-1]["value"]) == pytest.approx(got.final_average)


def test_what_the_clients_log(finished: tuple[Experiment, Summary]) -> None:
    experiment, _ = finished
    logged = defaultdict(set)
    for row in rows(experiment.run_dir):
        if row["metric"].startswith("client/") and "bytes" not in row["metric"]:
            logged[int(row["round"])].add(row["metric"])
            assert np.isfinite(float(row["value"]))
    looks = {"feature_distance", "feature_variance", "weight_variance", "product_variance", "qkv_change"}
    looks = {f"generated/{name}" for name in looks | {"class_token_change"}}
    looks |= {f"gradient/{part}" for part in ("cnn", "generator", "head")}
    costs = {"generated/shuffled_cost", "generated/mean_cost"}  # when a task ends
    first = {"collaborate/cross_entropy"} | looks
    replay = {f"replay/{name}" for name in ("cross_entropy", "features", "weights")}
    expected = {1: first, 2: first | costs, 3: first | replay, 4: first | replay | costs}
    assert logged == {n: {f"client/{c}/{name}" for c in range(3) for name in names} for n, names in expected.items()}


def test_means_over_clients_take_the_place_of_their_numbers(finished: tuple[Experiment, Summary]) -> None:
    history = checkpoint.progress(finished[0].run_dir / "checkpoint")["history"]
    whole, logged = measured(history, 2, 2), dict[str, float]()
    tracker: Any = SimpleNamespace(log=lambda metrics, **_: logged.update(metrics))
    bar: Any = SimpleNamespace(update=lambda *_: None, reach=lambda _: None)
    callback = RunCallback(tracker, bar, 2, 2, {"history": history[:-1]}, {}, clients="aggregate")
    for client in (2, 0, 1):
        logger = callback.on_fit_start(2, 4, client)
        assert logger is not None
        logger.log_metrics({"loss": float(client), "epoch": 0.0})
    assert not logged
    callback.on_round_end(RoundResult.from_json(history[-1]))
    assert (logged["clients/loss/mean"], logged["clients/loss/deviation"]) == (1.0, 1.0)
    assert not [name for name in logged if "client/" in name or "epoch" in name]
    for single, of_all in (
        ("client/{}/bytes_up", "clients/bytes_up"),
        ("eval/seen/client/{}/task/2", "eval/seen/clients/task/2"),
    ):
        values = [whole[single.format(client)] for client in range(3)]
        assert logged[f"{of_all}/mean"] == pytest.approx(np.mean(values))
        assert logged[f"{of_all}/deviation"] == pytest.approx(np.std(values, ddof=1))
    assert {n: v for n, v in logged.items() if "client" not in n} == {
        n: v for n, v in whole.items() if "client" not in n
    }


def test_two_clients_are_too_few_for_a_mean_that_hides_them() -> None:
    assert together({0: {"a": 1.0, "b": 1.0}, 2: {"a": 5.0, "b": 2.0}, 1: {"a": 3.0}}, "clients/") == {
        "clients/a/mean": 3.0,
        "clients/a/deviation": 2.0,
    }


def test_nothing_of_a_client_is_recorded_where_nothing_is_wanted(finished: tuple[Experiment, Summary]) -> None:
    history = checkpoint.progress(finished[0].run_dir / "checkpoint")["history"]
    names = set(measured(history, 2, 2, "none"))
    assert "eval/none/mean" in names
    assert not [name for name in names if "client" in name]
    assert [
        Tracking(clients=clients).sends(secure) for clients in ("all", "aggregate") for secure in (False, True)
    ] == [
        *(True, True),
        *(True, False),
    ]
    assert not Tracking(clients="none").sends(False)


def test_the_split_is_kept(finished: tuple[Experiment, Summary]) -> None:
    experiment, _ = finished
    kept = json.loads((experiment.run_dir / "split.json").read_text())
    assert kept["split_sha256"] == experiment.data.split.sha256
    assert kept["classes"] == list(experiment.data.class_names)
    assert json.loads(experiment.data.split.to_json()) == kept["split"]


# ---- going on


def test_a_finished_run_is_not_run_again(finished: tuple[Experiment, Summary], monkeypatch: pytest.MonkeyPatch) -> None:
    experiment, summary = finished
    monkeypatch.setattr(Client, "begin_round", lambda *a: pytest.fail("trained"))
    files = {path: path.stat().st_mtime_ns for path in experiment.run_dir.rglob("*") if path.name != ".lock"}
    screen = console()
    assert experiment.run(screen) == summary
    assert "This run is finished" in text(screen)
    assert {path: path.stat().st_mtime_ns for path in files} == files


@pytest.mark.parametrize(("client", "round"), [(0, 1), (1, 3)])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    finished: tuple[Experiment, Summary],
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    client: int,
    round: int,
) -> None:
    experiment = make()
    train_end = FedLSCL.on_train_end

    def interrupt(self: FedLSCL) -> None:
        train_end(self)
        if (self.index, self.round.number) == (client, round):
            raise SystemExit(143)

    with monkeypatch.context() as patch:
        patch.setattr(FedLSCL, "on_train_end", interrupt)
        with pytest.raises(SystemExit):
            experiment.run(console())
    assert not (experiment.run_dir / "summary.json").exists()
    screen = console()
    summary = make().run(screen)
    assert (f"Continuing after round {round - 1}." in text(screen)) is (round > 1)
    assert lasting(asdict(summary)) == lasting(asdict(finished[1]))
    assert lasting_rows(experiment.run_dir) == lasting_rows(finished[0].run_dir)
    one, other = (sorted((e.run_dir / "checkpoint").glob("*.safetensors")) for e in (experiment, finished[0]))
    assert [path.name for path in one] == [path.name for path in other]
    assert len(one) >= 3
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("pictures", [True, False])
def test_an_interruption_after_the_last_round_loses_nothing(
    finished: tuple[Experiment, Summary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: bool
) -> None:
    experiment, summary = finished
    shutil.copytree(experiment.run_dir, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    for path in (tmp_path / "run").glob("*.png"):
        if not pictures:
            path.unlink()
    monkeypatch.setattr(Client, "begin_round", lambda *a: pytest.fail("trained"))
    again = replace(experiment, run_dir=tmp_path / "run").run(console())
    assert lasting(asdict(again)) == lasting(asdict(summary))
    assert rows(tmp_path / "run") == rows(experiment.run_dir)
    assert len(list((tmp_path / "run").glob("*.png"))) == 6


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, data: FederatedDataModule, vit: FrozenViT) -> Path:
    """The folder of a run that was interrupted in round 3 of 4."""
    experiment: Experiment = maker(tmp_path_factory.mktemp("interrupted"), data, vit)()
    train_end = FedLSCL.on_train_end

    def interrupt(self: FedLSCL) -> None:
        train_end(self)
        if self.round.number == 3:
            raise SystemExit(143)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FedLSCL, "on_train_end", interrupt)
        with pytest.raises(SystemExit):
            experiment.run(console())
    return experiment.run_dir


def copied(run_dir: Path, experiment: Experiment) -> Path:
    return shutil.copytree(run_dir, experiment.run_dir)


OTHER = {"setting": "tiny", "model": {"class_path": "FedLSCL", "init_args": {"epochs": 2}}}


def test_a_run_without_its_configuration_goes_on_under_no_other(
    interrupted: Path, make: Make, finished: tuple[Experiment, Summary], caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied(interrupted, make())
    before = (folder / "config.yaml").read_bytes()
    (folder / "config.yaml").unlink()
    with pytest.raises(ImpossibleRun, match=r"config\.yaml' is missing.* put back a copy, give the same configuration"):
        make(config=OTHER).run(console())
    assert lasting(asdict(make().run(console()))) == lasting(asdict(finished[1]))
    assert (folder / "config.yaml").read_bytes() == before
    assert "config.yaml' was missing and is written anew, the same as it was" in caplog.text


def test_a_run_without_its_split_goes_on_with_no_other(
    interrupted: Path, make: Make, cache: Path, data: FederatedDataModule, finished: tuple[Experiment, Summary]
) -> None:
    folder = copied(interrupted, make())
    (folder / "split.json").unlink()
    other = FederatedDataModule(Patterns(seed=1), data.split_spec, seed=0, cache_dir=str(cache))
    other.setup()
    with pytest.raises(ImpossibleRun, match=r"split\.json' is missing.* put back a copy, give the same data"):
        make(data=other).run(console())
    assert not (folder / "split.json").exists()
    assert lasting(asdict(make().run(console()))) == lasting(asdict(finished[1]))
    assert (folder / "split.json").exists()


@pytest.mark.parametrize("name", ["config.yaml", "split.json", "checkpoint/state.json", "metrics.csv"])
def test_a_changed_file_of_an_unfinished_run_is_named_and_nothing_is_touched(
    interrupted: Path, make: Make, name: str
) -> None:
    folder = copied(interrupted, make())
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ImpossibleRun, match=f"{re.escape(str(folder / name))}' is damaged.*put back a copy, or"):
        make().run(console())
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("damage", ["lost", "windows"])
def test_a_record_of_metrics_that_was_lost_costs_no_checkpoint(
    interrupted: Path, make: Make, finished: tuple[Experiment, Summary], damage: str
) -> None:
    folder = copied(interrupted, make())
    path = folder / "metrics.csv"
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    screen = console()
    assert lasting(asdict(make().run(screen))) == lasting(asdict(finished[1]))
    assert "Continuing after round 2." in text(screen)
    whole, found = lasting_rows(finished[0].run_dir), lasting_rows(folder)
    if damage == "lost":  # what clients logged while they trained is in no checkpoint
        logged = ("collaborate", "replay", "generated", "gradient")
        whole = [row for row in whole if int(row["round"]) > 2 or row["metric"].split("/")[-2] not in logged]
    assert found == whole


def test_a_damaged_summary_is_named_and_made_anew_once_it_is_gone(
    finished: tuple[Experiment, Summary], make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied(finished[0].run_dir, make())
    path = folder / "summary.json"
    before = path.read_text()
    path.write_text(before.replace('"threads": 1', '"threads": 3'))
    for use in (lambda: make().run(console()), lambda: read_runs(path), lambda: Summary.read(path)):
        with pytest.raises(ValueError, match=r"summary\.json' is damaged.* makes it anew from checkpoint/"):
            use()
    monkeypatch.setattr(Client, "begin_round", lambda *a: pytest.fail("trained"))
    path.unlink()
    make().run(console())
    assert path.read_text() == before
    (folder / "checkpoint" / "state.json").write_text("{")
    assert Summary.read(path) == finished[1]
    assert "summary.json' cannot be checked" in caplog.text


def test_a_finished_run_without_its_configuration_is_shown_for_no_other(
    finished: tuple[Experiment, Summary], make: Make
) -> None:
    folder = copied(finished[0].run_dir, make())
    (folder / "config.yaml").unlink()
    with pytest.raises(ImpossibleRun, match=r"model\.init_args\.epochs: 1 there, 2 now"):
        make(config=OTHER).run(console())
    assert make().run(console()) == finished[1]
    assert (folder / "config.yaml").read_bytes() == (finished[0].run_dir / "config.yaml").read_bytes()


def test_what_decorates_a_run_fails_after_its_numbers_are_safe(
    interrupted: Path, make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied(interrupted, make())
    with monkeypatch.context() as patch:
        patch.setattr("fedlscl.run.plots._save", lambda *a: (_ for _ in ()).throw(RuntimeError("no font")))
        summary = make().run(console())
    assert Summary.read(folder / "summary.json") == summary
    assert "not all of its pictures could be drawn: RuntimeError: no font" in caplog.text
    assert [path.name for path in folder.glob("*.png")] == ["split.png"]  # as the run began with
    assert make().run(console()) == summary
    assert len(list(folder.glob("*.png"))) == 6


def test_what_a_killed_process_left_behind_is_removed(interrupted: Path, make: Make) -> None:
    folder = copied(interrupted, make())
    left = [folder / n for n in (".tmpAbCdEf", ".config.yaml.12.tmp", "checkpoint/.tmpAbCdEf", "traceback.txt")]
    for path in left:
        path.touch()
    make().run(console())
    assert not [path for path in left if path.exists()]


def test_trouble_of_the_machine_ends_a_run_in_a_line(
    interrupted: Path, make: Make, monkeypatch: pytest.MonkeyPatch, finished: tuple[Experiment, Summary]
) -> None:
    copied(interrupted, make())
    for error, expected, line in (
        (
            OSError(28, "No space left on device", "metrics.csv"),
            StoppedRun,
            "metrics.csv: No space left on device; make",
        ),
        (MemoryError(), StoppedRun, "there is not enough memory"),
        (KeyError("oops"), KeyError, "oops"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(FedLSCL, "on_train_end", lambda self, error=error: (_ for _ in ()).throw(error))
            with pytest.raises(expected, match=line) as raised:
                make().run(console())
        assert "\n" not in str(raised.value)
    assert raised.value.__notes__ == ["This happened to client 0 in round 3."]
    assert lasting(asdict(make().run(console()))) == lasting(asdict(finished[1]))


def test_another_configuration_is_refused_by_field(finished: tuple[Experiment, Summary]) -> None:
    experiment, _ = finished
    other = {"setting": "tiny", "model": {"class_path": "FedLSCL", "init_args": {"epochs": 2}}}
    with pytest.raises(ValueError, match=r"model\.init_args\.epochs: 1 there, 2 now"):
        replace(experiment, config=other).run(console())


def test_differences_name_every_field() -> None:
    old = {"a": 1, "b": {"c": 2, "d": {"e": [1]}}, "gone": None, "kind": {"x": 1}}
    new = {"a": 1, "b": {"c": 3, "d": {"e": [1, 2]}}, "kind": "y", "new": 5}
    named = [text.split(":")[0] for text in differences(old, new)]
    assert named == ["b.c", "b.d.e", "kind", "new"]
    assert differences({}, {"cache_mib": 8192}) == ["cache_mib: not set there, 8192 now"]
    assert differences(old, old) == []


class Brighter(Patterns):
    """Other pixels under the same labels."""

    def load(self, cache_dir: Path) -> Dataset:
        data = super().load(cache_dir)
        return replace(data, train=replace(data.train, images=data.train.images // 2 + 100))


def weights(path: Path, vit: FrozenViT, add: float) -> FrozenViT:
    """The same ViT from a file, its position embedding shifted."""
    state = {name: tensor.clone().contiguous() for name, tensor in vit.vit.state_dict().items()}
    state["pos_embed"] += add
    save_file(state, path)
    return FrozenViT(**VIT, weights=str(path))


def test_a_run_does_not_go_on_with_other_data_or_weights_of_the_same_name(
    make: Make,
    tmp_path: Path,
    cache: Path,
    data: FederatedDataModule,
    vit: FrozenViT,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = SmallModel(SmallModelSpec(**CNN), "resnet18").backbone.state_dict()

    def described(source: Patterns, add: float = 0.0, add_small: float = 0.0) -> Experiment:
        described = FederatedDataModule(source, data.split_spec, seed=0, cache_dir=str(cache))
        described.setup()
        save_file({**first, "bn1.bias": first["bn1.bias"] + add_small}, tmp_path / "cnn.safetensors")
        cnn = SmallModelSpec(**CNN, weights=str(tmp_path / "cnn.safetensors"))
        return make(data=described, vit=weights(tmp_path / "vit.safetensors", vit, add), cnn=cnn)

    with monkeypatch.context() as patch:
        patch.setattr(FedLSCL, "on_train_end", lambda self: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            described(Patterns()).run(console())
    others: list[tuple[dict[str, Any], str]] = [
        ({"source": Patterns(train=11)}, "the images' classes, or how they are split, are not those"),
        ({"source": Brighter()}, "the images are not those"),
        ({"add": 0.1}, "the foundation model's weights are not those"),
        ({"add_small": 0.1}, "the small model's first weights are not those"),
    ]
    for changes, complaint in others:
        with pytest.raises(ValueError, match=f"{complaint} that the run in run_dir"):
            described(**{"source": Patterns(), **changes}).run(console())
    summary = described(Patterns()).run(console())
    assert summary.skipped == ()
    assert summary.cnn_weights_sha256 == sha256((tmp_path / "cnn.safetensors").read_bytes())


def test_one_process_to_a_folder(make: Make) -> None:
    experiment = make()
    experiment.run_dir.mkdir()
    with (experiment.run_dir / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="in use by another process"):
            experiment.run(console())
    assert [path.name for path in experiment.run_dir.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("wrong", "right", "complaint"),
    [
        ({"schedule": Schedule(2, 9)}, {"schedule": Schedule(2, 2)}, "clients_per_round is 9"),
        ({"client": make_client(block=12)}, {"client": make_client(block=1)}, "block is 12"),
        ({"cnn": SmallModelSpec("resnet99")}, {}, "resnet99"),
    ],
    ids=["clients_per_round", "block", "cnn"],
)
def test_a_mistake_does_not_spoil_the_run_folder(
    make: Make, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], right: dict[str, Any], complaint: str
) -> None:
    """Who corrects an impossible value may go on with the same folder."""
    with pytest.raises(ValueError, match=complaint):
        make(config={"value": "wrong"}, **wrong).run(console())
    monkeypatch.setattr(
        "fedlscl.run.experiment.Federation.run", lambda self, callback: (_ for _ in ()).throw(StopAsyncIteration)
    )
    with pytest.raises(StopAsyncIteration):
        make(config={"value": "right"}, **right).run(console())


def test_skipped_clients_are_reported(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    train_end = FedLSCL.on_train_end

    def fail(self: FedLSCL) -> None:
        if (self.index, self.round.number) == (1, 2):
            raise FloatingPointError("gone")
        train_end(self)

    monkeypatch.setattr(FedLSCL, "on_train_end", fail)
    screen = console()
    experiment = make()
    summary = experiment.run(screen)
    assert summary.skipped == (Skipped(2, 1, "FloatingPointError: gone"),)
    assert "without clients [1]" in text(screen)
    assert summary.bytes_up.by_round[1][1] is None
    skipped = [(row["round"], row["metric"]) for row in rows(experiment.run_dir) if row["metric"].endswith("skipped")]
    assert skipped == [("2", "client/1/skipped")]


class Told(FedLSCL):
    task_aware = ("task",)


def test_who_knows_the_task_of_an_image_says_so(make: Make) -> None:
    screen = console()
    summary = make(client=make_client(Told), schedule=Schedule(1)).run(screen)
    assert summary.task_aware == ("task",)
    assert "* with parameters that the task of each image" in text(screen)


def test_what_the_command_line_gave_is_noted_and_makes_no_other_run(make: Make) -> None:
    given = {"model.epochs": 1}
    assert make(schedule=Schedule(1), overrides=given).run(console()).overrides == given
    assert make(schedule=Schedule(1), overrides={}).run(console()).overrides == given  # it is finished


def test_few_clients_a_round_reach_the_summary(make: Make) -> None:
    summary = make(schedule=Schedule(1, 2)).run(console())
    for row in summary.bytes_up.by_round:
        assert sum(count is None for count in row) == 1
    assert len(summary.accuracy["seen"].matrix) == 3


def test_accuracy_arrays_take_the_last_round_of_each_task() -> None:
    history = [
        {
            "round": r,
            "task": (r + 1) // 2,
            "accuracy": {m: [[float(10 * r + t) for t in range((r + 1) // 2)]] for m in MASKS},
        }
        for r in (1, 2, 3)
    ]
    np.testing.assert_array_equal(accuracy_arrays(history, 2, 2)["seen"], [[[20.0, np.nan], [np.nan, np.nan]]])
