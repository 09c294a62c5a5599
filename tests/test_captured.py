"""Steps that are recorded once and repeated, on a tape instead of a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import copy_of, fit, make_client, make_federation, make_trainer, restore_client, run, same
from tape import recording
from torch import Tensor, nn

from fedlscl.batches import Batch
from fedlscl.client import TALLIES, Client
from fedlscl.continual import NoReplay
from fedlscl.data.module import FederatedDataModule
from fedlscl.federation import captured
from fedlscl.methods.fed_lscl import FedLSCL
from fedlscl.methods.fedavg import FedAvgClient
from fedlscl.models.vit import FrozenViT
from fedlscl.schedule import Round


@pytest.fixture
def body(tmp_path: Path, data: FederatedDataModule, vit: FrozenViT) -> Callable[..., Any]:
    """Makes client 0 of a small federation."""

    def make(kind: type[Client] = FedLSCL, **settings: Any) -> Any:
        numbered = tmp_path / str(len(list(tmp_path.iterdir())))
        return restore_client(make_federation(numbered, data, vit, make_client(kind, **settings)), 0)

    return make


def two_rounds(client: Any) -> dict[str, Tensor]:
    fit(client, 1, 1)
    fit(client, 2, 2)
    return copy_of(client.state())


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_clip": 0.01}, {"augment": "crop_flip"}, {"own_loss": 1.0, "standardise": "batch"}],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_the_numbers_are_those_of_single_steps(body: Callable[..., Any], settings: dict[str, Any]) -> None:
    wanted = two_rounds(body(epochs=4, **settings))
    with recording() as tape:
        found = two_rounds(body(epochs=4, **settings))
    assert same(wanted, found)
    assert tape.replays > tape.kinds > 2  # both phases
    assert not tape.differences


def test_what_is_logged_is_the_same(body: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, float]] = []
    monkeypatch.setattr(
        FedLSCL, "log_dict", lambda self, values: logged.append({n: float(v) for n, v in values.items()})
    )
    two_rounds(body(epochs=4))
    wanted, logged[:] = list(logged), []
    with recording():
        two_rounds(body(epochs=4))
    assert logged == wanted
    assert {"collaborate/cross_entropy", "replay/weights", "gradient/cnn"} <= set(wanted[-2])


def test_a_kind_is_recorded_once_it_has_been_done(body: Callable[..., Any]) -> None:
    client = body(FedAvgClient, continual=NoReplay(), epochs=3)
    with recording() as tape:
        client.begin_round(Round(1, 1, False, 0))
        sizes = [len(samples) for _, samples in client.plan]
        trainer = make_trainer()
        trainer.fit(client)
        assert tape.kinds == len({size for size in sizes if sizes.count(size) > 1})
        assert tape.replays == len(sizes) - len(set(sizes))
        assert trainer.global_step == len(sizes)
        # in the next fit the first step alone makes what is made once
        client.begin_round(Round(1, 2, False, 0))
        sizes = [len(samples) for _, samples in client.plan]
        before = tape.replays
        make_trainer().fit(client)
        assert tape.replays - before == len(sizes) - 1


def test_a_short_fit_is_not_worth_it(body: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with recording() as tape:
        monkeypatch.setattr(captured, "WORTH", 100)
        two_rounds(body(epochs=4))
    assert tape.kinds == 0


class Phases(FedAvgClient):
    """The head alone, then all: the second phase moves what no step has moved before."""

    def passes(self, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        for phase in ("head", "head", "all", "all", "all"):
            yield phase, self.epoch(0, len(self.current))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        output = self.output(batch.images)
        features = output.representation.detach() if batch.phase == "head" else output.representation
        return {"own": nn.functional.cross_entropy(self.head(features), batch.images.labels)}


def test_a_later_phase_may_move_more(body: Callable[..., Any]) -> None:
    settings: dict[str, Any] = {"continual": NoReplay()}
    wanted = two_rounds(body(Phases, **settings))
    with recording() as tape:
        assert same(wanted, two_rounds(body(Phases, **settings)))
    assert tape.kinds >= 3


class Logging(FedAvgClient):
    """Logs in its step as Lightning's users do."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        self.log("mine", batch.images.labels.float().mean(), batch_size=1, on_epoch=True, on_step=False)


class Refusing(FedAvgClient):
    uncapturable = "it does not want to"


def test_a_step_that_logs_is_not_recorded(body: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    wanted = two_rounds(body(Logging, epochs=3, continual=NoReplay()))
    with recording() as tape, caplog.at_level(logging.WARNING, "fedlscl"):
        found = two_rounds(body(Logging, epochs=3, continual=NoReplay()))
    assert same(wanted, found)
    assert tape.replays == 0
    assert "step of Logging cannot be recorded" in caplog.text
    assert "`tally`" in caplog.text


@pytest.mark.parametrize("why", ["said", "scaler", "device"])
def test_what_cannot_be_recorded_is_trained_as_always(
    body: Callable[..., Any], why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kind, tried = Refusing if why == "said" else FedAvgClient, list[str]()
    wanted = two_rounds(body(kind, epochs=3, continual=NoReplay()))
    with recording() as tape, caplog.at_level(logging.WARNING, "fedlscl"):
        if why == "scaler":
            monkeypatch.setattr("lightning.pytorch.plugins.precision.Precision.scaler", object(), raising=False)
        if why == "device":

            def refuse(*_: Any) -> None:
                tried.append(why)
                raise RuntimeError("operation not permitted when stream is capturing\nand more")

            monkeypatch.setattr(tape, "record", refuse)
        found = two_rounds(body(kind, epochs=3, continual=NoReplay()))
    assert same(wanted, found)
    assert tape.replays == 0
    assert tried == (["device"] if why == "device" else [])  # and not again with clients of this class
    assert ("(RuntimeError: operation not permitted when stream is capturing)" in caplog.text) == (why == "device")


def test_there_is_room_for_so_many_numbers(body: Callable[..., Any]) -> None:
    class Talkative(FedAvgClient):
        def losses(self, batch: Batch) -> dict[str, Tensor]:
            (term,) = super().losses(batch).values()
            return {str(number): term / TALLIES for number in range(TALLIES + 1)}

    with pytest.raises(ValueError, match=f"notes {TALLIES + 1} numbers, there is room for {TALLIES}"):
        fit(body(Talkative, continual=NoReplay()), 1, 1)


def test_the_tape_notices_what_a_graph_would_lose(body: Callable[..., Any]) -> None:
    """An own generator, a number that changes, a tensor that is another one each time, a wait."""

    class Wrong(FedAvgClient):
        def collaborative_losses(self, output: Any, batch: Batch) -> dict[str, Tensor]:
            self.steps = getattr(self, "steps", 0) + 1
            other = torch.from_numpy(batch.images.indices.copy()).float().mean()
            terms = super().collaborative_losses(output, batch)
            terms["wrong"] = {
                "number": output.logits.mean() * self.steps,
                "tensor": output.logits.mean() * other,
                "generator": torch.rand(1, generator=torch.Generator().manual_seed(0)).sum() * output.logits.mean(),
                "wait": output.logits.mean() * output.logits.max().item(),
            }[self.wrong]
            return terms

    for wrong in ("number", "tensor", "generator", "wait"):
        client = body(Wrong, epochs=4, continual=NoReplay())
        client.wrong = wrong
        with recording() as tape:
            fit(client, 1, 1)
        assert tape.differences, wrong


def test_a_whole_federation_is_the_same(tmp_path: Path, data: FederatedDataModule, vit: FrozenViT) -> None:
    def states(name: str) -> list[dict[str, Tensor]]:
        federation = make_federation(tmp_path / name, data, vit, make_client(epochs=3))
        run(federation)
        return [copy_of(restore_client(federation, index).state()) for index in range(3)]

    wanted = states("single")
    with recording() as tape:
        found = states("recorded")
    assert all(same(one, other) for one, other in zip(wanted, found, strict=True))
    assert tape.replays
    assert not tape.differences
