"""What `fedlscl doctor` finds out about this machine; it writes nothing, and fetches nothing."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlsplit

import torch

from fedlscl import __version__
from fedlscl.data.module import cache_folder
from fedlscl.models.stored import SHIPPED
from fedlscl.run.console import human_bytes
from fedlscl.run.experiment import PACKAGES
from fedlscl.run.tracking import wandb_is

OPTIONAL = ("flwr", "pandas")
SECONDS = 3.0
"""How long the hub may take to answer."""


def findings() -> Iterator[tuple[str, str]]:
    """What there is, by what it is called."""
    yield "fedlscl", f"{__version__}, Python {platform.python_version()} on {platform.platform()}"
    packages = ((name, _version(name)) for name in (*PACKAGES, *OPTIONAL) if name != "fedlscl")
    yield "packages", ", ".join(f"{name} {found or 'is not there'}" for name, found in packages)
    yield "CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {_capability()}"
    yield from _accelerators()
    for what, folder in (("cache", cache_folder()), ("runs", Path("runs").absolute())):
        yield what, f"{folder}, {human_bytes(_free(folder))} free on its disk"
    shipped = ", ".join(sorted(file.name for file in SHIPPED.glob("*.safetensors")))
    yield "weights", f"shipped: {shipped}; fetched by timm: {', '.join(sorted(_fetched())) or 'none'}"
    yield "hub", _hub()
    try:
        yield "W&B", wandb_is("auto")
    except ValueError as error:
        yield "W&B", f"no run can begin: {error}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _capability() -> str:
    """Vector units, and whether there are some for bf16 (Linux says so; elsewhere nobody knows)."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return torch.backends.cpu.get_cpu_capability()
    units = [name for name in ("avx512_bf16", "amx_bf16") if name in flags]
    told = f"bf16 units ({', '.join(units)})" if units else "no bf16 units: --trainer.precision 32-true is faster"
    return f"{torch.backends.cpu.get_cpu_capability()}, {told}"


def _accelerators() -> Iterator[tuple[str, str]]:
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(number)
            bf16 = "bf16" if found.major >= 8 else "no bf16 units"
            yield f"GPU {number}", f"{found.name}, {human_bytes(found.total_memory)}, {bf16}"
    elif torch.backends.mps.is_available():
        yield "GPU", "Apple's, as --trainer.accelerator mps"
    else:
        built = torch.version.cuda
        yield "GPU", f"none that torch can use (torch is built {f'for CUDA {built}' if built else 'without CUDA'})"


def _free(folder: Path) -> float:
    """Bytes that are free where a folder is, or will be."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    return shutil.disk_usage(there).free


def _fetched() -> Iterator[str]:
    """The models of timm that the hub's cache on this machine holds."""
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    for folder in Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser().glob("models--timm--*"):
        yield folder.name.rpartition("--")[2]


def _hub() -> str:
    """Whether what `pretrained: true` needs can be had; only a connection is opened."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return "switched off by HF_HUB_OFFLINE; give --backbone.weights FILE"
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        with socket.create_connection((address.hostname or "", address.port or 443), SECONDS):
            return f"{address.hostname} can be reached"
    except OSError as error:
        proxy = (
            "; a proxy may still lead there" if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") else ""
        )
        return f"{address.hostname} cannot be reached ({error}); give --backbone.weights FILE{proxy}"
