"""Every random number of a run comes from one seed and the place where it is used, never from global state.

A stream is named by (seed, purpose, numbers such as task, round and client). Neither the order of clients nor a
resumed process can therefore change a result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(seed: int, *keys: int | str) -> int:
    """A 63-bit seed for the stream named by `keys`, independent of every other stream of `seed`."""
    words = [key if isinstance(key, int) else _number(key) for key in keys]
    # their number comes first because SeedSequence takes missing words for zeros
    state = np.random.SeedSequence([len(words), seed, *words]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def generator(seed: int, *keys: int | str) -> torch.Generator:
    """A CPU generator for the stream named by `keys`."""
    return torch.Generator().manual_seed(derive(seed, *keys))


def numpy_generator(seed: int, *stream: int) -> np.random.Generator:
    """A generator of NumPy for the stream of these numbers, as splits and test sets are drawn with."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=stream))


@contextmanager
def seeded(seed: int, *keys: int | str) -> Iterator[None]:
    """Run torch's global generators (initialisation, dropout) on one stream, and put them back afterwards."""
    own = derive(seed, *keys)
    if torch.accelerator.is_available():
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(own)
            yield
    else:  # without a device torch would keep the stack of each call, in case that one turns up
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(own)
            yield


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
