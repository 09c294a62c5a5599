"""What every method must keep to, for each file in experiments/methods, whatever the method is.

Two runs of a method are looked at from all sides: one with everyone in it, and, of one method of each kind, one that is
repeated on Flower and taken up again.
"""

from __future__ import annotations

import inspect
import shutil
from collections import defaultdict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from helpers import SETTING, Known, Recorder, copy_of, fresh, known, outcome, restore_client, same
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from made_runs import make_summary
from PIL import Image
from tape import recording
from torch import Tensor

from fedlscl import methods
from fedlscl.cli import main
from fedlscl.client import Client
from fedlscl.evaluation import MASKS
from fedlscl.federation.algorithm import Federation
from fedlscl.federation.callback import RoundResult
from fedlscl.federation.secure.fixed_point import BITS, decode, encode, most_bits
from fedlscl.messages import Download, Message, Upload, schema_of
from fedlscl.methods.joint import Pooled
from fedlscl.run.experiment import Experiment
from fedlscl.run.folder import RunFolder
from fedlscl.run.predict import Prediction, predict, predictions
from fedlscl.schedule import Round, Schedule
from fedlscl.server import Context, Total

PARTS = [(client, task) for client in range(3) for task in range(2)]
METHODS = sorted((Path(__file__).parent.parent / "experiments" / "methods").glob("*.yaml"))
BUDGET = {"epochs": 1, "batch_size": 8, "buffer_size": 3}
CLIENT_BUDGET: dict[str, dict[str, int]] = {  # where clients compute much beside their training
    "glfc": {"perturbation_steps": 2},
    "fed_ranpac": {"projection": 100},
    "fed_discriminants_both": {"epochs": 2},  # it trains in one round alone, and some layers move in the second step
}
SERVER_BUDGET: dict[str, dict[str, int]] = {  # of the servers that train
    "glfc": {"iterations": 1, "monitors": 1},
    "target": {"synthesis_rounds": 3, "steps": 3, "batch_size": 8},
    "mfcl": {"steps": 6, "batch_size": 8},
}
TRAINED_VIT = {"fedavg_vit", "ewc_vit", "lwf_vit"}  # methods whose clients begin with the ViT and train it
FROM_SUMS = {  # methods whose server needs no more than sums over the clients
    *("fed_lscl_sums", "fed_lscl_auto", "fed_lscl_fedavg", "small_fedavg"),
    *("fedavg", "fedprox", "ewc", "lwf", "fedavg_vit", "ewc_vit", "lwf_vit", "fedavg_ccvr", "target", "mfcl"),
    *("fedvit", "fedvit_replay", "fedvit_rows", "fed_lora", "ffa_lora", "fed_lora_ccvr"),
    *("fed_l2p", "fed_dualprompt", "fed_codaprompt", "fedproto"),
    *("fedncm", "fed_ridge", "fed_ranpac", "ccvr", "fed_discriminants", "fed_discriminants_both"),
}
HELD = {"ffa_lora": {"a.0"}}  # parameters that a method leaves as they were drawn


def budget(method: Path) -> list[str]:
    """Words for as little work as shows what is tested; not every client trains in steps."""
    client = getattr(methods, yaml.safe_load(method.read_text())["model"]["class_path"])
    accepted = inspect.signature(client).parameters
    given = {name: value for name, value in BUDGET.items() if {name, "kwargs"} & set(accepted)}
    return [
        *(f"--model.init_args.{n}={value}" for n, value in {**given, **CLIENT_BUDGET.get(method.stem, {})}.items()),
        *(f"--server.init_args.{name}={value}" for name, value in SERVER_BUDGET.get(method.stem, {}).items()),
    ]


class Sent(NamedTuple):
    """One message and its bytes."""

    message: Message
    data: bytes


class Run(NamedTuple):
    """One run with everything that could be seen of it."""

    results: list[RoundResult]
    sent: list[Sent]
    states: list[dict[str, Tensor]]
    private: dict[str, bytes]
    still: dict[int, set[str]]  # by client the parameters that no round has moved


class Motion(Callback):
    """Notes which parameters a fit has moved; of a tensor over all classes, the rows of the client's classes count."""

    def __init__(self, still: dict[int, set[str]]) -> None:
        self.still = still

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before = copy_of(dict(pl_module.named_parameters()))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, Client):
            names = {name for name, parameter in pl_module.named_parameters() if self.moved(pl_module, name, parameter)}
            self.still.setdefault(pl_module.index, set(self.before)).difference_update(names)

    def moved(self, client: Client, name: str, parameter: Tensor) -> bool:
        change = (parameter.detach() - self.before[name]) != 0
        if len(change) != client.num_classes:
            return bool(change.any())
        seen = client.data.tasks[: client.memory.begun]
        return all(bool(change[label].any()) for part in seen for label in part.classes)


def words_of(method: Path, folder: Path) -> list[str]:
    """The words for a method's file under the tiny setting."""
    setting = {**SETTING, "data": {**SETTING["data"], "cache_dir": str(folder)}}
    (folder / "setting.yaml").write_text(yaml.safe_dump(setting))
    return ["--config", str(folder / "setting.yaml"), "--config", str(method), *budget(method), "--run_dir", "nodes"]


def experiment_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """What the command line makes of words."""
    built: list[Experiment] = []
    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "run", lambda self, console: built.append(self))
        patch.setattr("fedlscl.run.configuration.Configuration", Known)
        main(["fit", *words])
    return built[0]


def federation_of(experiment: Experiment, folder: Path, still: dict[int, set[str]]) -> Federation:
    def trainer(logger: Logger | None) -> Trainer:
        made: Any = experiment.trainer(logger)
        made.callbacks.append(Motion(still))
        return made  # type: ignore[no-any-return]

    return replace(experiment, trainer=trainer, run_dir=folder).federation()


def private_values(federation: Federation) -> dict[str, bytes]:
    """As bytes what is in the clients' states and not to travel; numbers too few to be told apart are left out."""
    found = {}
    for index in range(federation.clients):
        body = restore_client(federation, index)
        shared = {tensor.data_ptr() for tensor in body.shared().values()}
        kept = {name: tensor for name, tensor in body.memory.to_tensors().items() if "." not in name}
        for name, tensor in {**body.state_dict(keep_vars=True), **kept}.items():
            if tensor.data_ptr() not in shared and tensor.unique().numel() > 3:
                found[f"{name} of client {index}"] = tensor.detach().numpy().tobytes()
    return found


@contextmanager
def heard(sent: list[Sent]) -> Iterator[None]:
    """Put every message that is serialised into a list."""
    serialise = Message.to_bytes

    def spy(self: Message) -> bytes:
        data = serialise(self)
        sent.append(Sent(type(self)(self.client, self.task, self.round, self.samples, copy_of(self.tensors)), data))
        return data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Message, "to_bytes", spy)
        yield


def observed(federation: Federation, first: Path | None = None) -> Run:
    """Run a federation under observation; `first` becomes a copy of its store as it was after the first round."""
    sent: list[Sent] = []
    private: dict[str, bytes] = {}
    results = []
    with heard(sent):
        for result in federation.run(Recorder()):
            results.append(result)
            so_far = len(sent)
            private |= {f"{name} in round {result.round}": v for name, v in private_values(federation).items()}
            del sent[so_far:]  # of looking on
            if first is not None and result.round == 1:
                shutil.copytree(federation.store.folder, first)
    states = [copy_of(restore_client(federation, index).state()) for index in range(federation.clients)]
    return Run(results, sent, states, private, {})


def kinds(method: Path) -> set[Hashable]:
    """What tells methods apart in kind: their classes, and settings that are no numbers, which choose between ways."""
    content = yaml.safe_load(method.read_text())
    settings = {**content["model"].get("init_args", {}), **content["server"].get("init_args", {})}
    return {
        (content["model"]["class_path"], content["server"]["class_path"]),
        *((name, value) for name, value in settings.items() if isinstance(value, str | bool)),
        *((name, value["class_path"]) for name, value in settings.items() if isinstance(value, dict)),
    }


def first_of_their_kinds(methods: list[Path]) -> list[Path]:
    """Methods that have together all kinds that there are."""
    found: set[Hashable] = set()
    first = []
    for method in methods:
        if not kinds(method) <= found:
            first.append(method)
            found |= kinds(method)
    return first


OF_A_KIND = first_of_their_kinds(METHODS)


# those first, so that they have the same numbers for all tests: pytest runs by it what shares a fixture
@pytest.fixture(
    scope="module", params=[*OF_A_KIND, *(m for m in METHODS if m not in OF_A_KIND)], ids=lambda path: path.stem
)
def method(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture(scope="module")
def words(method: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return words_of(method, tmp_path_factory.mktemp(method.stem))


@pytest.fixture(scope="module")
def described(words: list[str]) -> Iterator[Experiment]:
    """What is run here, by `fresh` copies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["fedlscl"])
        yield experiment_of(words, patch)
    known.cache_clear()


@pytest.fixture(scope="module")
def whole(described: Experiment, tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Run]:
    """Two tasks of two rounds with everyone in them."""
    folder, experiment = tmp_path_factory.mktemp("whole"), fresh(described)
    still: dict[int, set[str]] = {}
    run = observed(federation_of(experiment, folder / "store", still))._replace(still=still)
    return replace(experiment, run_dir=folder / "store"), run


def test_everyone_takes_part_and_is_evaluated(whole: tuple[Experiment, Run]) -> None:
    experiment, seen = whole
    assert [(r.task, r.round) for r in seen.results] == [(1, 1), (1, 2), (2, 3), (2, 4)]
    for result in seen.results:
        assert result.skipped == {}
        for values in result.accuracy.values():
            assert [len(row) for row in values] == [result.task] * 3
            assert all(0 <= value <= 100 for row in values for value in row)
    assert experiment.method != "custom"


def test_at_most_one_message_each_way_and_round(whole: tuple[Experiment, Run]) -> None:
    _, seen = whole
    counts: dict[tuple[type[Message], int, int], int] = defaultdict(int)
    for message, _ in seen.sent:
        counts[type(message), message.client, message.round] += 1
    assert set(counts.values()) <= {1}
    for result in seen.results:
        for kind, counted in ((Upload, result.bytes_up), (Download, result.bytes_down)):
            found = {m.client: len(d) for m, d in seen.sent if isinstance(m, kind) and m.round == result.round}
            assert found == counted


def test_only_what_is_declared_travels(whole: tuple[Experiment, Run], tmp_path: Path) -> None:
    experiment, seen = whole
    body = restore_client(federation_of(experiment, tmp_path, {}), 0)
    for message, _ in seen.sent:
        schema = body.upload_schema() if isinstance(message, Upload) else body.download_schema()
        if message.round == 0:
            schema = schema_of(body.shared())  # the common start
        assert {name for name, spec in schema.items() if not spec.optional} <= set(message.tensors) <= set(schema)
        for name, tensor in message.tensors.items():
            assert schema[name].problem(tuple(tensor.shape), tensor.dtype) is None
    # the frozen ViT and the classes of the head belong to nobody's message
    begins_with_it = experiment.method in TRAINED_VIT  # which is then in the common start
    everything = b"".join(data for message, data in seen.sent if message.round or not begins_with_it)
    vit = [tensor.numpy().tobytes() for tensor in experiment.vit.state_dict().values() if tensor.unique().numel() > 3]
    assert not any(value in everything for value in vit)


def test_what_is_sent_once_is_sent_in_the_first_round_of_a_task(whole: tuple[Experiment, Run]) -> None:
    """Without it a secure sum is made in every round, and with it in none where a client may have something new."""
    experiment, seen = whole
    uploads = [m for m, _ in seen.sent if isinstance(m, Upload)]
    of_images = {round.number for round in Schedule(2).after(0, 2, 0) if experiment.client.sends_images(round)}
    sent = {m.round for m in uploads if m.tensors} & of_images
    first = {min(number for number in of_images if (number - 1) // 2 == task) for task in (0, 1)}
    assert not uploads or (sent == first) == experiment.client.sends_once


def test_sums_of_terms_answer_as_the_uploads_do(whole: tuple[Experiment, Run]) -> None:
    """In fixed point too, to the last bit; or the method is one that secure sums are refused to."""
    experiment, seen = whole
    server: Any = experiment.server
    assert (server.beyond_sums() is None) == (experiment.method in FROM_SUMS)
    if experiment.method not in FROM_SUMS:
        return
    uploads = {m.client: m for m, _ in seen.sent if isinstance(m, Upload) and m.round == 3}
    context = Context(3, Round(2, 3, False, 7), lambda: None, {})  # type: ignore[arg-type,return-value]
    before = copy_of(server.state())
    torch.manual_seed(0)  # for heads that are trained on what is drawn
    answers, _ = server.aggregate(uploads, context)
    server.load(before)
    terms = [server.terms(upload) for _, upload in sorted(uploads.items())]
    factors = server.factors(max(upload.samples for upload in uploads.values()))
    assert set(factors) <= set(terms[0])
    bits = [most_bits(3, factors[name]) if name in factors else BITS for name in terms[0]]
    words = np.stack([encode(one, bits, 3) for one in terms]).sum(0, dtype=np.uint64)
    sums = decode(words, bits, {name: tensor.shape for name, tensor in terms[0].items()})
    samples = sum(upload.samples for upload in uploads.values())
    torch.manual_seed(0)
    found, _ = server.from_sums(Total((0, 1, 2), samples, sums), context)
    assert set(found) == set(answers) == {0, 1, 2}
    for client, answer in answers.items():
        assert set(found[client].tensors) == set(answer.tensors)
        for name, tensor in answer.tensors.items():
            if not name.endswith("num_batches_tracked"):  # their largest is no sum
                torch.testing.assert_close(found[client].tensors[name], tensor, rtol=0, atol=0)


def inside(everything: bytes, values: dict[str, bytes]) -> list[str]:
    """Names of the values that are in there; whole values are looked for only where eight of their bytes are.

    The eight are some that few messages have, with different bytes among them, and are looked for together.
    """
    starts = {
        name: max(
            (value[at : at + 8] for at in range(0, min(len(value), 256) - 7, 2)),
            key=lambda eight: (eight[:2] != bytes(2), len(set(eight))),
        )
        for name, value in values.items()
        if len(value) >= 8
    }
    wanted = np.frombuffer(b"".join(starts.values()), "<u8")
    begins = np.zeros(2**16, dtype=bool)  # with their first two bytes, after which few are left
    begins[wanted & 0xFFFF] = True
    there: set[bytes] = set()
    for shift in range(8):
        windows = np.frombuffer(everything, "<u8", (len(everything) - shift) // 8, shift)
        there |= {window.tobytes() for window in np.intersect1d(windows[begins[windows & 0xFFFF]], wanted)}
    return [n for n, value in values.items() if (n not in starts or starts[n] in there) and value in everything]


def test_nothing_private_travels(whole: tuple[Experiment, Run]) -> None:
    experiment, seen = whole
    private, train = dict(seen.private), experiment.data.dataset.train
    for number, image in enumerate(torch.from_numpy(train.images)):
        for form in (image, image.float(), image.float() / 255):
            private[f"image {number} as {form.dtype}, {form.max()}"] = form.numpy().tobytes()
    for index, client in enumerate(experiment.data.split.clients):
        for number, part in enumerate(client.tasks):
            labels = torch.as_tensor(train.labels[part.train])
            for form in (labels, labels.int(), labels.float()):
                private[f"labels of client {index}, task {number}, {form.dtype}"] = form.numpy().tobytes()
    everything = b"".join(data for _, data in seen.sent)
    assert inside(everything, {"part": everything[-1001:-18], "short": everything[-7:]}) == ["part", "short"]
    assert inside(everything, private) == []


def test_training_moves_everything(whole: tuple[Experiment, Run]) -> None:
    experiment, seen = whole
    assert seen.still == dict.fromkeys(range(3), HELD.get(experiment.method, set()))


def test_prediction_from_files_is_that_of_the_evaluation(whole: tuple[Experiment, Run], tmp_path: Path) -> None:
    """Each client's accuracies among the classes seen come out of the run's folder and image files again, exactly."""
    experiment, seen = whole
    run_dir, told = experiment.run_dir, "seen" in experiment.client.task_aware
    RunFolder(run_dir).begin(experiment._beginning, {})
    acc = {mask: np.array(seen.results[-1].accuracy[mask])[:, None].repeat(2, 1) for mask in MASKS}
    acc = {mask: np.where(np.tri(2, dtype=bool), values, np.nan) for mask, values in acc.items()}
    make_summary(acc=acc, task_aware=tuple(experiment.client.task_aware)).write(run_dir / "summary.json")
    test, names = experiment.data.dataset.test, experiment.data.class_names
    for index, image in enumerate(test.images):
        Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(tmp_path / f"{index}.png")
    split, clients = experiment.data.split, range(3)
    if told:
        with pytest.raises(ValueError, match=r"give the task, 1 to 2 \(--task N\)"):
            predict(run_dir, [str(tmp_path / "0.png")])
    files = {
        (n, task): [str(tmp_path / f"{index}.png") for index in split.clients[n].tasks[task].test] for n, task in PARTS
    }
    found: dict[tuple[str, int], str] = {}  # by file and client
    for asked in ((0,), (1,)) if told else ((0, 1),):
        wanted = [file for (_, task), names_of in files.items() if task in asked for file in names_of]
        for each in predictions(run_dir, wanted, clients, asked[0] + 1 if told else None):
            assert isinstance(each, Prediction), each
            found[each.image, each.client] = each.label
    for n, task in PARTS:
        labels = test.labels[split.clients[n].tasks[task].test]
        hits = [found[file, n] == names[label] for file, label in zip(files[n, task], labels, strict=True)]
        assert 100 * sum(hits) / len(hits) == seen.results[-1].accuracy["seen"][n][task]


def test_the_vit_is_not_part_of_a_state(whole: tuple[Experiment, Run]) -> None:
    experiment, seen = whole
    vit = {t.numpy().tobytes() for t in experiment.vit.state_dict().values() if t.unique().numel() > 3}
    for state in seen.states:
        assert not any(tensor.contiguous().numpy().tobytes() in vit for tensor in state.values())


ABSENT = Schedule(1, clients_per_round=2)
"""One client is absent from each round, and one of them begins with the second task."""


@pytest.fixture(scope="module")
def absent(described: Experiment, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A run with one client absent in each of two rounds, and the folder of one that was ended after the first."""
    folder, experiment = tmp_path_factory.mktemp("absent"), replace(fresh(described), schedule=ABSENT)
    federation = federation_of(experiment, folder / "whole", {})
    return observed(federation, first=folder / "ended" / federation.store.folder.name), folder / "ended"


def uploads_of(sent: list[Sent]) -> dict[tuple[int, int], Upload]:
    """By round and client."""
    return {(m.round, m.client): m for m, _ in sent if isinstance(m, Upload)}


def same_uploads(ones: dict[tuple[int, int], Upload], others: dict[tuple[int, int], Upload]) -> bool:
    """Whether they are equal to the last bit."""
    return ones.keys() == others.keys() and all(
        (a.task, a.samples) == (b.task, b.samples) and same(a.tensors, b.tensors)
        for a, b in ((one, others[key]) for key, one in ones.items())
    )


@pytest.mark.parametrize("method", OF_A_KIND, ids=lambda path: path.stem, indirect=True)
def test_clients_may_be_absent(absent: tuple[Run, Path]) -> None:
    one, _ = absent
    assert [(result.task, result.round) for result in one.results] == [(1, 1), (2, 2)]
    assert all(result.skipped == {} for result in one.results)
    assert all(len(result.bytes_up) in (0, 2) for result in one.results)


@pytest.mark.parametrize("method", OF_A_KIND, ids=lambda path: path.stem, indirect=True)
def test_a_run_that_is_taken_up_again_has_the_same_numbers(described: Experiment, absent: tuple[Run, Path]) -> None:
    one, ended = absent
    rest = observed(federation_of(replace(fresh(described), schedule=ABSENT), ended, {}))
    assert [result.round for result in rest.results] == [2]
    assert outcome(rest.results) == outcome(one.results[1:])
    assert all(same(a, b) for a, b in zip(one.states, rest.states, strict=True))
    uploads = {key: upload for key, upload in uploads_of(one.sent).items() if key[0] == 2}
    assert same_uploads(uploads, uploads_of(rest.sent))


@pytest.mark.parametrize("method", OF_A_KIND, ids=lambda path: path.stem, indirect=True)
def test_equal_seeds_give_equal_runs_in_one_process_and_on_flower(
    method: Path,
    words: list[str],
    described: Experiment,
    absent: tuple[Run, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command_line: None,
) -> None:
    """On Flower every node has its own images alone; bytes, accuracies and metrics are equal to the last bit."""
    one, _ = absent
    pytest.importorskip("flwr")
    from test_flower import Place, at_once, client, dealt

    at_once(monkeypatch)
    client._place.cache_clear()  # of the method before
    place = Place(tmp_path, dealt(tmp_path, words))
    if isinstance(described.client, Pooled):
        with pytest.raises(ValueError, match="needs the images of all clients in one place"):
            place.on_flower()
        federation = place.in_process()
    else:
        federation = place.on_flower()
    federation.schedule = ABSENT
    again: list[Sent] = []
    with heard(again):
        assert outcome(list(federation.run(Recorder()))) == outcome(one.results)
    assert same_uploads(uploads_of(one.sent), uploads_of(again))


def test_another_seed_is_another_run(described: Experiment, tmp_path: Path) -> None:
    experiment, states = fresh(described), []
    for seed in (1, 2):
        federation = federation_of(replace(experiment, seed=seed), tmp_path / str(seed), {})
        states.append(copy_of(restore_client(federation, 0).state()))
    assert not same(*states)


@pytest.mark.parametrize("method", OF_A_KIND, ids=lambda path: path.stem, indirect=True)
def test_its_training_step_can_be_recorded_or_says_why_not(whole: tuple[Experiment, Run]) -> None:
    federation = fresh(whole[0]).federation()
    client = restore_client(federation, 0)
    client.epochs = 2
    with recording() as tape:
        federation.transport.worker.fit(client, Round(2, 5, False, federation.template.seed), None)
    assert not tape.differences
    assert (tape.replays > 0) != bool(client.uncapturable)


def test_there_are_methods() -> None:
    assert METHODS
