"""What the tests of the running machine share: one tiny data set and one frozen ViT."""

from __future__ import annotations

import logging
import os
import signal
import sys

# Byte code is kept even where the environment says otherwise: dozens of processes start here, and what they import
# takes each of them 10 s to compile. This is read before the workers start
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# ruff: noqa: E402
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# What the fixtures import takes seconds, and the process that hands tests to the workers needs none of it: these start
# at once
if TYPE_CHECKING:
    from fedlscl.data.module import FederatedDataModule
    from fedlscl.federation.algorithm import Federation
    from fedlscl.messages import Message
    from fedlscl.methods.fed_lscl import FedLSCL
    from fedlscl.models.vit import FrozenViT


def pytest_configure(config: pytest.Config) -> None:
    # LightningCLI 2.6 calls a function that newer releases of jsonargparse deprecate
    config.addinivalue_line("filterwarnings", "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


# A worker takes file after file: the long ones first, and none waits at the end for another's
LONGEST = (
    "contract",
    "flower",
    "deployment",
    "reliability",
    "bench",
    "report",
    "sweep",
    "killed",
    "wandb_server",
    "cli",
    "start",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Put back what a command does about signals in its own process, which processes started later would inherit."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The models are tiny: a second thread would only wait for the first."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def power() -> Iterator[None]:
    """Wait for no disk: what is forced onto it outlives a loss of power, of which there is none in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def data(cache: Path) -> FederatedDataModule:
    """Three clients, two tasks of two classes."""
    from helpers import make_data

    return make_data(cache)


@pytest.fixture(scope="session")
def long_data(cache: Path) -> FederatedDataModule:
    """Three clients, three tasks of two classes."""
    from helpers import make_data

    return make_data(cache, tasks=3, private_classes=1, public_classes=5)


@pytest.fixture(scope="session")
def vit() -> FrozenViT:
    from helpers import make_vit

    return make_vit()


@pytest.fixture
def federation(tmp_path: Path, data: FederatedDataModule, vit: FrozenViT) -> Federation:
    from helpers import make_federation

    return make_federation(tmp_path, data, vit)


@pytest.fixture
def body(federation: Federation) -> FedLSCL:
    """Client 0, which has learned nothing yet."""
    from helpers import restore_client

    client: FedLSCL = restore_client(federation, 0)
    return client


@pytest.fixture
def make(tmp_path: Path, data: FederatedDataModule, vit: FrozenViT) -> Callable[..., Federation]:
    """Build federations, each with a store of its own."""
    from helpers import make_federation

    count = iter(range(100))

    def build(**options: Any) -> Federation:
        return make_federation(tmp_path / str(next(count)), **{"data": data, "vit": vit, **options})

    return build


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Message, bytes]]:
    """Every message that is serialised, with its bytes."""
    from fedlscl.messages import Message

    sent = []
    serialise = Message.to_bytes

    def spy(self: Message) -> bytes:
        data = serialise(self)
        copy = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        sent.append((type(self)(self.client, self.task, self.round, self.samples, copy), data))
        return data

    monkeypatch.setattr(Message, "to_bytes", spy)
    return sent


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Let `main(args)` run inside a test: no arguments but those, a folder of its own, and no trace afterwards."""
    import torch

    monkeypatch.setattr(sys, "argv", ["fedlscl"])
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.chdir(tmp_path)
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels, threads = [logger.level for logger in loggers], torch.get_num_threads()
    random_state = torch.random.get_rng_state()
    yield
    torch.random.set_rng_state(random_state)
    torch.set_num_threads(threads)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
