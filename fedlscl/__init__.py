"""Federated continual learning experiments on PyTorch Lightning: Fed-LSCL and what it is compared with.

What a user needs from Python is here, and is imported when it is first asked for; the methods are in `fedlscl.methods`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlscl.analysis.results import read_runs as read_runs
    from fedlscl.batches import Batch as Batch
    from fedlscl.batches import Images as Images
    from fedlscl.batches import Output as Output
    from fedlscl.client import Client as Client
    from fedlscl.continual import Continual as Continual
    from fedlscl.continual import NoReplay as NoReplay
    from fedlscl.continual import Replay as Replay
    from fedlscl.data.client_folders import ClientFolders as ClientFolders
    from fedlscl.data.cub import CUB200 as CUB200
    from fedlscl.data.folders import ImageFolder as ImageFolder
    from fedlscl.data.folders import ImageNetR as ImageNetR
    from fedlscl.data.hubs import HuggingFace as HuggingFace
    from fedlscl.data.hubs import MedMNIST as MedMNIST
    from fedlscl.data.inks import Coloured as Coloured
    from fedlscl.data.inks import Inked as Inked
    from fedlscl.data.listed import ImageTable as ImageTable
    from fedlscl.data.module import FederatedDataModule as FederatedDataModule
    from fedlscl.data.packed import CIFAR10 as CIFAR10
    from fedlscl.data.packed import CIFAR100 as CIFAR100
    from fedlscl.data.packed import Digits as Digits
    from fedlscl.data.source import Dataset as Dataset
    from fedlscl.data.source import ImageSet as ImageSet
    from fedlscl.data.source import Source as Source
    from fedlscl.data.splits import SplitSpec as SplitSpec
    from fedlscl.data.torchvision_sets import Torchvision as Torchvision
    from fedlscl.federation.callback import RoundResult as RoundResult
    from fedlscl.messages import AtMost as AtMost
    from fedlscl.messages import Download as Download
    from fedlscl.messages import MessageError as MessageError
    from fedlscl.messages import Schema as Schema
    from fedlscl.messages import TensorSpec as TensorSpec
    from fedlscl.messages import Upload as Upload
    from fedlscl.messages import schema_of as schema_of
    from fedlscl.models.cnn import SmallModel as SmallModel
    from fedlscl.models.cnn import SmallModelSpec as SmallModelSpec
    from fedlscl.models.vit import FrozenViT as FrozenViT
    from fedlscl.run.simulation import simulate as simulate
    from fedlscl.schedule import Round as Round
    from fedlscl.server import Answer as Answer
    from fedlscl.server import Answers as Answers
    from fedlscl.server import Context as Context
    from fedlscl.server import FedAvg as FedAvg
    from fedlscl.server import Isolated as Isolated
    from fedlscl.server import Metrics as Metrics
    from fedlscl.server import Server as Server

__version__ = "0.1.0"

_HOMES = {
    "analysis.results": ("read_runs",),
    "batches": ("Batch", "Images", "Output"),
    "client": ("Client",),
    "continual": ("Continual", "NoReplay", "Replay"),
    "data.client_folders": ("ClientFolders",),
    "data.cub": ("CUB200",),
    "data.folders": ("ImageFolder", "ImageNetR"),
    "data.hubs": ("HuggingFace", "MedMNIST"),
    "data.inks": ("Coloured", "Inked"),
    "data.listed": ("ImageTable",),
    "data.module": ("FederatedDataModule",),
    "data.packed": ("CIFAR10", "CIFAR100", "Digits"),
    "data.source": ("Dataset", "ImageSet", "Source"),
    "data.splits": ("SplitSpec",),
    "data.torchvision_sets": ("Torchvision",),
    "federation.callback": ("RoundResult",),
    "messages": ("AtMost", "Download", "MessageError", "Schema", "TensorSpec", "Upload", "schema_of"),
    "models.cnn": ("SmallModel", "SmallModelSpec"),
    "models.vit": ("FrozenViT",),
    "run.simulation": ("simulate",),
    "schedule": ("Round",),
    "server": ("Answer", "Answers", "Context", "FedAvg", "Isolated", "Metrics", "Server"),
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import what is asked for."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(_MODULE_OF)
