"""What the tests of the running machine share: one tiny data set and one frozen ViT."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import make_data, make_vit

from fedlscl.backbones import FrozenViT
from fedlscl.data import FederatedDataModule


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def data(cache: Path) -> FederatedDataModule:
    """Three clients, two tasks of two classes."""
    return make_data(cache)


@pytest.fixture(scope="session")
def long_data(cache: Path) -> FederatedDataModule:
    """Three clients, three tasks of two classes."""
    return make_data(cache, tasks=3, public_classes=2, private_classes=4)


@pytest.fixture(scope="session")
def vit() -> FrozenViT:
    return make_vit()
