"""The parts that FedWeIT takes weights apart into: channels under masks, sparse vectors, attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def drift(weights: Sequence[Tensor], before: Sequence[Tensor], held: Sequence[Tensor]) -> Tensor:
    """Sum over s of 1/2 ||(W - W*) * sigmoid(m_s)||^2, a scalar.

    Args:
        weights: W of each map, (c, ...) each.
        before: W* of each map, flat.
        held: of each map the sum over s of sigmoid(m_s)^2, (c,) each.
    """
    maps = zip(weights, before, held, strict=True)
    moved = [((w - b.view_as(w)).square().flatten(1).sum(1) * h).sum() for w, b, h in maps]
    return torch.stack(moved).sum() / 2


def attended(attention: Tensor, knowledge: Tensor, sizes: Sequence[int]) -> Tensor:
    """(n,) sum over j of alpha_j A_j, from alpha (J, L), A (J, n) and the sizes of the L maps."""
    parts = torch.split(knowledge, list(sizes), dim=1)
    return torch.cat([alpha @ part for alpha, part in zip(attention.unbind(1), parts, strict=True)])


def beyond(adaptive: Tensor, threshold: float) -> Tensor:
    """A where its absolute value is above the threshold, elsewhere zero."""
    return torch.where(adaptive.abs() > threshold, adaptive, 0.0)


def kept_channels(mask: Tensor, pruned: float) -> Tensor:
    """(c,) true where |m| is above its quantile `pruned`; everywhere if it is nowhere, as with a single channel."""
    size = mask.abs()
    kept = size > size.quantile(pruned)
    return kept if bool(kept.any()) else torch.ones_like(kept)


def per_channel(values: Tensor, weight: Tensor) -> Tensor:
    """(c,) in a shape that multiplies the channels of (c, ...)."""
    return values.view(-1, *[1] * (weight.ndim - 1))


def entries(flat: Tensor) -> dict[str, Tensor]:
    """The `places` (int32) and `values` of what is not zero in (n,); those of the first entry if all is."""
    places = flat.nonzero().squeeze(1)
    if not len(places):
        places = places.new_zeros(1)
    return {"places": places.int(), "values": flat[places]}


def join(vectors: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Several vectors as `entries` gives them, one behind another, and as `counts` how many entries each has."""
    joined = {name: torch.cat([one[name] for one in vectors]) for name in ("places", "values")}
    return {**joined, "counts": torch.tensor([len(one["places"]) for one in vectors], dtype=torch.int32)}


def dense(joined: Mapping[str, Tensor], size: int) -> Tensor:
    """The reverse of `join` and `entries`: (vectors, n)."""
    counts = joined["counts"]
    vectors = torch.zeros(len(counts), size)
    owners = torch.arange(len(counts)).repeat_interleave(counts.long())
    vectors[owners, joined["places"].long()] = joined["values"]
    return vectors
