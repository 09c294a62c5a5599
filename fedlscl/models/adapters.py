"""How a frozen ViT is adapted: what can be injected into its blocks, and the generator of per-sample LoRA weights.

Prompts at the input are no injection: they are tokens among the others, see `FrozenViT.prompted`.

Shapes: B batch, T tokens, d ViT width, e feature width, r LoRA rank, P = r*d + 3*d*r, L length of a prefix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class LoRA(NamedTuple):
    """A LoRA pair for a linear layer, for all samples or one per sample."""

    a: Tensor  # (r, in) or (B, r, in)
    b: Tensor  # (out, r) or (B, out, r)


class ParameterGenerator(nn.Linear):
    """phi: features (B, e) to generated weights W (B, P) (Fed-LSCL, section 4.2).

    At the start every generated B matrix is zero, so the adapted ViT equals the frozen one; the biases that make the A
    matrices follow the usual LoRA initialisation, Kaiming-uniform with a = sqrt(5).
    """

    def __init__(self, features: int, width: int, rank: int, start: float = 0.0) -> None:
        super().__init__(features, rank * width + 3 * width * rank)
        self.rank, self.width = rank, width
        size_a = rank * width
        with torch.no_grad():
            nn.init.kaiming_uniform_(self.bias[:size_a].view(rank, width), a=math.sqrt(5))
            self.weight[size_a:].zero_()
            self.bias[size_a:].zero_()
            if start > 0:
                self.weight[size_a:].normal_(std=start)

    def split(self, weights: Tensor) -> LoRA:
        """W (B, P) as one LoRA pair per sample."""
        a, b = weights.tensor_split([self.rank * self.width], dim=1)
        return LoRA(a.view(-1, self.rank, self.width), b.view(-1, 3 * self.width, self.rank))


class Injection(Protocol):
    """Something that acts inside one block of a ViT."""

    @property
    def block(self) -> int:
        """Index of the block."""

    def into(self, block: nn.Module) -> AbstractContextManager[None]:
        """Act on this block inside the context, and leave no trace behind."""


@dataclass(frozen=True)
class LowRank:
    """A linear layer returns W h + c + scale * (h A^T) B^T.

    Args:
        block: index of the block.
        lora: one pair for all samples, or one for each sample of the batch that will pass.
        layer: which linear layer of the block: attn.qkv, attn.proj, mlp.fc1 or mlp.fc2.
        scale: alpha / r.
    """

    block: int
    lora: LoRA
    layer: str = "attn.qkv"
    scale: float = 1.0

    @contextmanager
    def into(self, block: nn.Module) -> Iterator[None]:
        """Add the product of low rank to what the layer returns."""

        def add(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            (h,) = inputs  # (B, T, in)
            low = h @ self.lora.a.mT
            if self.lora.a.ndim == 2:  # a product and a sum at once
                rows = torch.addmm(output.flatten(0, -2), low.flatten(0, -2), self.lora.b.mT, alpha=self.scale)
                return rows.view_as(output)
            return output + self.scale * (low @ self.lora.b.mT)

        with _hooks(block.get_submodule(self.layer).register_forward_hook(add)):
            yield


@dataclass(frozen=True)
class Prefixes:
    """Every token of a block also attends to L keys and values that no token has (prefix tuning; Li and Liang, 2021).

    Args:
        block: index of the block.
        keys_values: (B, 2, L, heads, d / heads), keys first; where the model normalises its keys, these are too.
    """

    block: int
    keys_values: Tensor

    @contextmanager
    def into(self, block: nn.Module) -> Iterator[None]:
        """Put L rows behind the tokens for as long as the attention lasts; what they would attend to is dropped."""
        count = self.keys_values.shape[2]
        if count == 0:
            yield
            return
        keys, values = self.keys_values.flatten(3).unbind(1)  # (B, L, d) each
        rows = torch.cat([torch.zeros_like(keys), keys, values], dim=2)  # they ask nothing

        def lengthen(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            return (F.pad(inputs[0], (0, 0, 0, count)),)

        def replace(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            return torch.cat([output[:, :-count], rows.to(output.dtype)], dim=1)

        def shorten(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            return output[:, :-count]

        attention = block.get_submodule("attn")
        with _hooks(
            attention.register_forward_pre_hook(lengthen),
            attention.get_submodule("qkv").register_forward_hook(replace),
            attention.register_forward_hook(shorten),
        ):
            yield


@contextmanager
def _hooks(*handles: RemovableHandle) -> Iterator[None]:
    """Remove them at the end, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
