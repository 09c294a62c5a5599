"""Whether timm's pretrained weights can be had, asked once: its own loading tries for half a minute."""

from __future__ import annotations

SECONDS = 5.0
"""How long an answer of the hub is waited for."""
_FILE = "model.safetensors"


def cached(repository: str) -> bool:
    """Whether timm would find the weights of a repository, such as ``timm/resnet18.a1_in1k``, without a connection."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, _FILE), str)


def unreachable(repository: str) -> str | None:
    """Why the hub does not give the weights of a repository; None if it does."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_hf_file_metadata(hf_hub_url(repository, _FILE), timeout=SECONDS)
    except Exception as error:  # whatever a network, a proxy or the hub itself come up with
        return in_short(error)
    return None


def in_short(error: Exception) -> str:
    """What went wrong, in a line of 80 letters at most."""
    return (" ".join(str(error).split()) or type(error).__name__)[:80]
