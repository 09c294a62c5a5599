"""Shamir's secret sharing (1979): of n shares any t give the secret, and fewer say nothing of it.

The shares of a secret are values of a random polynomial of degree t - 1 over a prime field, whose value at 0 is the
secret.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache

PRIME = 2**256 + 297
"""The smallest prime above all secrets of `SECRET` bytes."""

SECRET, SHARE = 32, 33  # bytes


def split(secret: bytes, holders: Sequence[int], threshold: int) -> list[bytes]:
    """A share of `SHARE` bytes for each holder.

    Args:
        secret: `SECRET` bytes.
        holders: different numbers from 0 on, one for each share.
        threshold: how many shares give the secret.
    """
    coefficients = [*(secrets.randbelow(PRIME) for _ in range(threshold - 1)), int.from_bytes(secret)]
    shares = []
    for holder in holders:
        value = 0
        for coefficient in coefficients:
            value = (value * (holder + 1) + coefficient) % PRIME
        shares.append(value.to_bytes(SHARE))
    return shares


def combine(shares: Mapping[int, bytes]) -> bytes | None:
    """The secret, from as many shares as the threshold says, by holder; None if they are of no secret.

    With shares that were changed, or too few, it is another one.
    """
    weights = _weights(tuple(shares))
    value = sum(w * int.from_bytes(share) for w, share in zip(weights, shares.values(), strict=True)) % PRIME
    return value.to_bytes(SECRET) if value < 2 ** (8 * SECRET) else None


@lru_cache(maxsize=64)
def _weights(holders: tuple[int, ...]) -> list[int]:
    """What each holder's share counts in the value at 0 (Lagrange)."""
    weights = []
    for holder in holders:
        above = below = 1
        for other in holders:
            if other != holder:
                above = above * (other + 1) % PRIME
                below = below * (other - holder) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return weights
