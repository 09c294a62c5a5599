"""The last block of a ViT for those of its tokens that are read: what only the others would need is not computed.

Not even keys and values: q is asked of all tokens h_j as (W_k^T q) h_j, and W_v is applied to the mean of all h_j that
the shares of attention weigh, once for each token that is read. In exact arithmetic that is what the block computes.

Shapes: B batch, T tokens, n of them read, d ViT width, H heads, e = d / H, r LoRA rank, L length of a prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fedlscl.models.adapters import Injection, LowRank, Prefixes


def serves(block: Any, injections: Sequence[Injection]) -> bool:
    """Whether `first_tokens` knows this kind of block, and all that is to act inside it."""
    from timm.layers.attention import Attention
    from timm.models.vision_transformer import Block

    plain = type(block) is Block and type(block.attn) is Attention and getattr(block.attn, "gate", None) is None
    return plain and all(isinstance(injection, LowRank | Prefixes) for injection in injections)


def first_tokens(block: Any, tokens: Tensor, count: int, injections: Sequence[Injection] = ()) -> Tensor:
    """The first tokens (B, n, d) as they leave a block in evaluation mode.

    Args:
        block: one that it `serves`.
        tokens: (B, T, d) that enter it.
        count: n.
        injections: what acts inside the block.
    """
    attention = block.attn
    h = block.norm1(tokens).to(attention.qkv.weight.dtype)  # under autocast once, not for each product
    pairs = [one for one in injections if isinstance(one, LowRank) and one.layer == "attn.qkv"]
    prefixes = [one.keys_values for one in injections if isinstance(one, Prefixes) and one.keys_values.shape[2]]
    with ExitStack() as stack:
        for injection in injections:
            if isinstance(injection, LowRank) and injection.layer != "attn.qkv":
                stack.enter_context(injection.into(block))
        attended = attention.norm(_attend(attention, h, count, pairs, prefixes))
        x = tokens[:, :count] + block.ls1(attention.proj(attended))
        read: Tensor = x + block.ls2(block.mlp(block.norm2(x)))
    return read


def _attend(attention: Any, h: Tensor, count: int, pairs: Sequence[LowRank], prefixes: Sequence[Tensor]) -> Tensor:
    """What the first n of the tokens (B, T, d) attend to, (B, n, d), before the projection."""
    query, key, value = (_Rows(attention, part, pairs) for part in range(3))
    q = attention.q_norm(query(h[:, :count])) * attention.scale  # (B, H, n, e)
    linear = isinstance(attention.k_norm, nn.Identity)
    # without q b_k, which is the same for all tokens
    scores = torch.einsum("bhnd,btd->bhnt", key.transposed(q), h) if linear else q @ attention.k_norm(key(h)).mT
    if not prefixes:
        return value(torch.einsum("bhnt,btd->bhnd", scores.softmax(-1), h)).transpose(1, 2).flatten(2)
    keys, values = torch.cat([*prefixes], dim=2).transpose(2, 3).unbind(1)  # (B, H, L, e) each
    keys = keys - key.bias if linear else attention.k_norm(keys)
    shares = torch.cat([scores, q @ keys.mT], dim=-1).softmax(-1)
    own, others = shares.tensor_split([h.shape[1]], dim=-1)
    # the bias counts in full, as if it were the prefixes' too, and is taken from these
    attended = value(torch.einsum("bhnt,btd->bhnd", own, h)) + others @ (values - value.bias)
    return attended.transpose(1, 2).flatten(2)


class _Rows:
    """Those rows of attn.qkv that make the queries (`part` 0), the keys (1) or the values (2), under LoRA pairs."""

    def __init__(self, attention: Any, part: int, pairs: Sequence[LowRank]) -> None:
        def of_heads(rows: Tensor) -> Tensor:  # (..., 3 d, x) to (..., H, e, x)
            shape = 3, attention.num_heads, attention.head_dim, rows.shape[-1]
            return rows.view(*rows.shape[:-2], *shape).select(-4, part)

        weight, bias = attention.qkv.weight, attention.qkv.bias
        self.weight = of_heads(weight)  # (H, e, d)
        self.bias = of_heads(weight.new_zeros(len(weight), 1) if bias is None else bias[:, None]).mT  # (H, 1, e)
        self.pairs = [(one.lora.a, of_heads(one.lora.b), one.scale, "b" * (one.lora.a.ndim - 2)) for one in pairs]

    def __call__(self, x: Tensor) -> Tensor:
        """(B, H, n, e) of x (B, n, d), or (B, H, n, d) where the heads have different ones."""
        each = "bn" if x.ndim == 3 else "bhn"
        y = torch.einsum(f"{each}d,hed->bhne", x, self.weight) + self.bias
        for a, b, scale, own in self.pairs:
            low = torch.einsum(f"{each}d,{own}rd->{each}r", x, a)
            y = y + scale * torch.einsum(f"{each}r,{own}her->bhne", low, b)
        return y

    def transposed(self, y: Tensor) -> Tensor:
        """(B, H, n, d), the sums over e of y (B, H, n, e) times the weights."""
        x = torch.einsum("bhne,hed->bhnd", y, self.weight)
        for a, b, scale, own in self.pairs:
            low = torch.einsum(f"bhne,{own}her->bhnr", y, b)
            x = x + scale * torch.einsum(f"bhnr,{own}rd->bhnd", low, a)
        return x
