"""Per-sample LoRA against one adapted copy of the projection per sample, in a block of a timm ViT."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedlscl.adapters import LoRA, ParameterGenerator, per_sample_lora
from fedlscl.backbones import FrozenViT

WIDTH, RANK, DEPTH = 12, 3, 4


@pytest.fixture(scope="module")
def frozen() -> FrozenViT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        args = {"patch_size": 8, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 3}
        return FrozenViT("vit_tiny_patch16_224", image_size=16, model_args=args)


@pytest.fixture
def block() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        vit = timm.create_model("vit_tiny_patch16_224", img_size=16, embed_dim=WIDTH, depth=1, num_heads=3)
        return vit.blocks[0].double().eval()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs(batch: int) -> LoRA:
    return LoRA(normal(batch, RANK, WIDTH, seed=3), normal(batch, 3 * WIDTH, RANK, seed=4))


def sample_by_sample(block: nn.Module, tokens: Tensor, lora: LoRA, scale: float) -> Tensor:
    """The definition: each sample passes a block of its own, whose qkv weight is W + scale B A."""
    outputs = []
    for x, a, b in zip(tokens, lora.a, lora.b, strict=True):
        update = torch.zeros(3 * WIDTH, WIDTH, dtype=x.dtype)
        for r in range(RANK):
            update = update + torch.outer(b[:, r], a[r])
        outputs.append(functional_call(block, {"attn.qkv.weight": block.attn.qkv.weight + scale * update}, (x[None],)))
    return torch.cat(outputs)


@pytest.mark.parametrize("scale", [1.0, 0.25, 16.0])
def test_every_sample_passes_a_block_of_its_own(block: nn.Module, scale: float) -> None:
    tokens, lora = normal(5, 7, WIDTH), pairs(5)
    with per_sample_lora(block.attn.qkv, lora, scale):
        adapted = block(tokens)
    torch.testing.assert_close(adapted, sample_by_sample(block, tokens, lora, scale), rtol=1e-11, atol=1e-11)
    assert not torch.allclose(adapted, block(tokens))


def test_the_gradients_are_those_of_the_loop(block: nn.Module) -> None:
    tokens, (a, b) = normal(4, 5, WIDTH).requires_grad_(), pairs(4)
    a.requires_grad_()
    b.requires_grad_()
    upstream = normal(4, 5, WIDTH, seed=9)
    with per_sample_lora(block.attn.qkv, LoRA(a, b), 0.5):
        adapted = block(tokens)
    leaves = (tokens, a, b)
    got = torch.autograd.grad((adapted * upstream).sum(), leaves)
    looped = (sample_by_sample(block, tokens, LoRA(a, b), 0.5) * upstream).sum()
    for gradient, wanted in zip(got, torch.autograd.grad(looped, leaves), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-10)
        assert gradient.abs().max() > 1e-3


def test_the_gradients_are_those_of_finite_differences() -> None:
    projection = nn.Linear(2, 6).double().requires_grad_(False)

    def adapted(h: Tensor, a: Tensor, b: Tensor) -> Tensor:
        with per_sample_lora(projection, LoRA(a, b), 0.7):
            return projection(h)

    inputs = [normal(*shape, seed=k).requires_grad_() for k, shape in enumerate([(2, 3, 2), (2, 1, 2), (2, 6, 1)])]
    assert torch.autograd.gradcheck(adapted, inputs)


def test_no_sample_touches_another(block: nn.Module) -> None:
    tokens, lora = normal(4, 5, WIDTH), pairs(4)
    order = torch.tensor([2, 0, 3, 1])
    with per_sample_lora(block.attn.qkv, lora, 1.0):
        straight = block(tokens)
    with per_sample_lora(block.attn.qkv, LoRA(lora.a[order], lora.b[order]), 1.0):
        torch.testing.assert_close(block(tokens[order]), straight[order], rtol=1e-11, atol=1e-11)


def test_afterwards_the_projection_is_as_before(block: nn.Module) -> None:
    tokens, qkv = normal(2, 5, WIDTH), block.attn.qkv
    before = block(tokens)
    with per_sample_lora(qkv, pairs(2), 1.0):
        assert len(qkv._forward_hooks) == 1
    assert len(qkv._forward_hooks) == 0
    assert torch.equal(block(tokens), before)

    with pytest.raises(KeyError, match="inside"), per_sample_lora(qkv, pairs(2), 1.0):
        raise KeyError("inside")
    assert len(qkv._forward_hooks) == 0
    with pytest.raises(RuntimeError), per_sample_lora(qkv, pairs(3), 1.0):  # three pairs for two samples
        block(tokens)
    assert len(qkv._forward_hooks) == 0
    assert torch.equal(block(tokens), before)


# ------------------------------------------------------------------ generator


def test_a_generated_vector_is_a_first_and_then_b() -> None:
    generator = ParameterGenerator(features=5, width=2, rank=3)
    assert generator.out_features == 3 * 2 + 6 * 3
    rows = torch.arange(2 * 24.0).view(2, 24)
    a, b = generator.split(rows)
    assert a.shape == (2, 3, 2)
    assert b.shape == (2, 6, 3)
    assert a[0].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert b[0].tolist() == [[6, 7, 8], [9, 10, 11], [12, 13, 14], [15, 16, 17], [18, 19, 20], [21, 22, 23]]
    assert torch.equal(torch.cat([a.flatten(1), b.flatten(1)], dim=1), rows)


@pytest.mark.parametrize(("width", "rank"), [(12, 3), (96, 4), (768, 4)])
def test_the_start_is_that_of_lora(width: int, rank: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        generator = ParameterGenerator(features=8, width=width, rank=rank)
    features = 100 * torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    lora = generator.split(generator(features))
    assert torch.count_nonzero(lora.b) == 0
    assert lora.b.shape == (6, 3 * width, rank)
    assert bool((lora.a != 0).any(dim=(1, 2)).all())
    bias = generator.bias[: rank * width]
    bound = 1 / math.sqrt(width)  # Kaiming-uniform with a = sqrt(5), as nn.Linear(width, rank) starts
    assert 0.8 * bound < bias.abs().max() <= bound
    assert bias.abs().median() > 0.2 * bound
    assert torch.count_nonzero(generator.bias[rank * width :]) == 0
    assert torch.count_nonzero(generator.weight[rank * width :]) == 0
    assert torch.count_nonzero(generator.weight[: rank * width]) > 0


def test_the_start_follows_the_random_seed() -> None:
    made = []
    for seed in (5, 5, 6):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            made.append(ParameterGenerator(4, 6, 2))
    for name in ("weight", "bias"):
        one, same, other = (getattr(generator, name) for generator in made)
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


def test_the_first_step_can_leave_the_start() -> None:
    """B is zero, so A gets no gradient yet; B must get one, or nothing would ever be learned."""
    frozen_projection = nn.Linear(6, 18).requires_grad_(False)
    generator = ParameterGenerator(4, 6, 2)
    with per_sample_lora(frozen_projection, generator.split(generator(torch.ones(3, 4))), 1.0):
        frozen_projection(torch.ones(3, 5, 6)).square().sum().backward()
    assert generator.weight.grad is not None
    assert torch.count_nonzero(generator.weight.grad[: 2 * 6]) == 0
    assert torch.count_nonzero(generator.weight.grad[2 * 6 :]) > 0


# ---------------------------------------------------------------- in the ViT


@pytest.mark.parametrize("block_index", range(DEPTH))
def test_at_the_start_the_adapted_vit_is_the_frozen_one_to_the_last_bit(frozen: FrozenViT, block_index: int) -> None:
    generator = ParameterGenerator(8, WIDTH, RANK)
    images = torch.randint(256, (5, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    lora = generator.split(generator(torch.randn(5, 8, generator=torch.Generator().manual_seed(2))))
    tokens = frozen.prefix(frozen.prepare(images), block_index)
    for scale in (1.0, 16.0):
        assert torch.equal(frozen.suffix(tokens, block_index, lora, scale), frozen(images))


@pytest.mark.parametrize("block_index", range(DEPTH))
def test_only_the_adapted_block_changes(frozen: FrozenViT, block_index: int) -> None:
    tokens = frozen.prefix(torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(5)), block_index)
    lora = LoRA(*(tensor.float() for tensor in pairs(3)))
    adapted = frozen.suffix(tokens, block_index, lora, 0.5)
    blocks = frozen.vit.blocks
    expected = sample_by_sample(blocks[block_index], tokens, lora, 0.5)
    expected = frozen.vit.norm(blocks[block_index + 1 :](expected))[:, 0]
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-4)
    plain = frozen.suffix(tokens, block_index)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    torch.testing.assert_close(plain, frozen.vit.norm(blocks[block_index:](tokens))[:, 0])
