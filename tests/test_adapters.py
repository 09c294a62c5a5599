"""What is injected into the blocks of a timm ViT, against the definitions written out sample by sample."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedlscl.models.adapters import LoRA, LowRank, ParameterGenerator, Prefixes
from fedlscl.models.vit import FrozenViT

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
    with LowRank(0, lora, scale=scale).into(block):
        adapted = block(tokens)
    torch.testing.assert_close(adapted, sample_by_sample(block, tokens, lora, scale), rtol=1e-11, atol=1e-11)
    assert not torch.allclose(adapted, block(tokens))


def test_the_gradients_are_those_of_the_loop(block: nn.Module) -> None:
    tokens, (a, b) = normal(4, 5, WIDTH).requires_grad_(), pairs(4)
    a.requires_grad_()
    b.requires_grad_()
    upstream = normal(4, 5, WIDTH, seed=9)
    with LowRank(0, LoRA(a, b), scale=0.5).into(block):
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
        with LowRank(0, LoRA(a, b), layer="0", scale=0.7).into(nn.Sequential(projection)):
            return projection(h)

    inputs = [normal(*shape, seed=k).requires_grad_() for k, shape in enumerate([(2, 3, 2), (2, 1, 2), (2, 6, 1)])]
    assert torch.autograd.gradcheck(adapted, inputs)


def test_no_sample_touches_another(block: nn.Module) -> None:
    tokens, lora = normal(4, 5, WIDTH), pairs(4)
    order = torch.tensor([2, 0, 3, 1])
    with LowRank(0, lora).into(block):
        straight = block(tokens)
    with LowRank(0, LoRA(lora.a[order], lora.b[order])).into(block):
        torch.testing.assert_close(block(tokens[order]), straight[order], rtol=1e-11, atol=1e-11)


def test_afterwards_the_projection_is_as_before(block: nn.Module) -> None:
    tokens, qkv = normal(2, 5, WIDTH), block.attn.qkv
    before = block(tokens)
    with LowRank(0, pairs(2)).into(block):
        assert len(qkv._forward_hooks) == 1
    assert len(qkv._forward_hooks) == 0
    assert torch.equal(block(tokens), before)

    with pytest.raises(KeyError, match="inside"), LowRank(0, pairs(2)).into(block):
        raise KeyError("inside")
    assert len(qkv._forward_hooks) == 0
    with pytest.raises(RuntimeError), LowRank(0, pairs(3)).into(block):  # three pairs for two samples
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
    lora = generator.split(generator(torch.ones(3, 4)))
    with LowRank(0, lora, layer="0").into(nn.Sequential(frozen_projection)):
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
    tokens = frozen.lower(frozen.prepare(images), block_index)
    for scale in (1.0, 16.0):
        assert torch.equal(frozen.upper(tokens, block_index, [LowRank(block_index, lora, scale=scale)]), frozen(images))


@pytest.mark.parametrize("block_index", range(DEPTH))
def test_only_the_adapted_block_changes(frozen: FrozenViT, block_index: int) -> None:
    tokens = frozen.lower(torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(5)), block_index)
    lora = LoRA(*(tensor.float() for tensor in pairs(3)))
    adapted = frozen.upper(tokens, block_index, [LowRank(block_index, lora, scale=0.5)])
    blocks = frozen.vit.blocks
    expected = sample_by_sample(blocks[block_index], tokens, lora, 0.5)
    expected = frozen.vit.norm(blocks[block_index + 1 :](expected))[:, 0]
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-4)
    plain = frozen.upper(tokens, block_index)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    torch.testing.assert_close(plain, frozen.vit.norm(blocks[block_index:](tokens))[:, 0])


# ---------------------------------------------------------------- fixed LoRA

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@pytest.mark.parametrize("layer", LAYERS)
def test_a_fixed_pair_is_a_change_of_the_weight(block: nn.Module, layer: str) -> None:
    weight = block.get_submodule(layer).weight
    lora = LoRA(normal(RANK, weight.shape[1], seed=3), normal(weight.shape[0], RANK, seed=4))
    tokens = normal(5, 7, WIDTH)
    with LowRank(0, lora, layer, 0.3).into(block):
        adapted = block(tokens)
    merged = functional_call(block, {f"{layer}.weight": weight + 0.3 * lora.b @ lora.a}, (tokens,))
    torch.testing.assert_close(adapted, merged, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(adapted, block(tokens))


def test_several_layers_of_several_blocks_are_adapted_at_once(frozen: FrozenViT) -> None:
    tokens = frozen.lower(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5)), 1)
    injections, changed = [], {}
    for number, (index, layer) in enumerate([(1, "mlp.fc1"), (3, "attn.proj"), (3, "mlp.fc1")]):
        weight = frozen.vit.blocks[index].get_submodule(layer).weight
        a, b = normal(2, weight.shape[1], seed=number).float(), normal(weight.shape[0], 2, seed=9 + number).float()
        injections.append(LowRank(index, LoRA(a, b), layer))
        changed[f"{index}.{layer}.weight"] = weight + b @ a
    expected = tokens
    for index in range(1, DEPTH):
        own = {n.removeprefix(f"{index}."): w for n, w in changed.items() if n.startswith(f"{index}.")}
        expected = functional_call(frozen.vit.blocks[index], own, (expected,))
    adapted = frozen.upper(tokens, 1, injections)
    torch.testing.assert_close(adapted, frozen.vit.norm(expected)[:, 0], rtol=1e-4, atol=1e-4)
    assert not any(len(module._forward_hooks) for module in frozen.modules())


def test_what_no_token_passes_is_refused(frozen: FrozenViT) -> None:
    tokens = frozen.lower(torch.zeros(1, 3, 16, 16), 2)
    for index in (1, DEPTH):
        with pytest.raises(ValueError, match=f"block {index}, but these tokens pass blocks 2 to 3"):
            frozen.upper(tokens, 2, [LowRank(index, LoRA(torch.zeros(1, WIDTH), torch.zeros(3 * WIDTH, 1)))])


def fixed_pairs(seed: int = 0) -> list[LowRank]:
    """LoRA in every layer of the last two blocks, and two in one layer."""
    sizes = {"attn.qkv": (12, 36), "attn.proj": (12, 12), "mlp.fc1": (12, 48), "mlp.fc2": (48, 12)}
    places = [*((block, layer) for block in (DEPTH - 2, DEPTH - 1) for layer in LAYERS), (DEPTH - 1, "mlp.fc1")]
    return [
        LowRank(
            block,
            LoRA(normal(2, sizes[layer][0], seed=seed + n).float(), normal(sizes[layer][1], 2, seed=-n - 1).float()),
            layer,
            0.1 * (n + 1),
        )
        for n, (block, layer) in enumerate(places)
    ]


@torch.no_grad()
def test_merged_pairs_are_the_injected_ones(frozen: FrozenViT) -> None:
    tokens, given = (
        frozen.lower(torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(5)), 1),
        fixed_pairs(),
    )
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    plain, injected = frozen.upper(tokens, 1), frozen.upper(tokens, 1, given)
    merged = frozen.merged(given)
    assert float((injected - plain).abs().max()) > 0.1
    for _ in range(2):
        torch.testing.assert_close(frozen.upper(tokens, 1, merged=merged), injected, rtol=1e-4, atol=1e-4)
    # other injections act beside them
    prefix = Prefixes(1, normal(3, 2, 4, 3, WIDTH // 3, seed=8).float())
    both = frozen.upper(tokens, 1, [*given, prefix])
    torch.testing.assert_close(frozen.upper(tokens, 1, [prefix], merged), both, rtol=1e-4, atol=1e-4)
    assert not any(len(module._forward_hooks) for module in merged.modules())

    assert torch.equal(frozen.upper(tokens, 1), plain)
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen.state_dict().items())
    own = {parameter.data_ptr(): name for name, parameter in frozen.vit.named_parameters()}
    copied = {name for name, parameter in merged.named_parameters() if parameter.data_ptr() not in own}
    assert copied == {f"blocks.{pair.block}.{pair.layer}.weight" for pair in given}  # memory of these layers alone
    assert not any(parameter.requires_grad for parameter in merged.parameters())


@torch.no_grad()
def test_in_mixed_precision_pairs_are_merged_before_the_weights_are_rounded(frozen: FrozenViT) -> None:
    tokens, given = (
        frozen.lower(torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(5)), 1),
        fixed_pairs(),
    )
    exact = frozen.merged(given)
    with torch.autocast("cpu", torch.bfloat16):
        merged = frozen.merged(given)
        features = frozen.upper(tokens, 1, merged=merged)
        injected = frozen.upper(tokens, 1, given)
    for pair in given:
        name = f"blocks.{pair.block}.{pair.layer}.weight"
        assert torch.equal(merged.get_parameter(name), exact.get_parameter(name).bfloat16())
    for name, parameter in frozen._model().named_parameters():
        assert parameter.dtype == torch.float32, name
    torch.testing.assert_close(features, injected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(features, frozen.upper(tokens, 1, merged=exact), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_pass_leaves_the_frozen_vit_as_it_was(frozen: FrozenViT, error: type[BaseException]) -> None:
    tokens, given = frozen.lower(torch.zeros(2, 3, 16, 16), 1), fixed_pairs()
    plain, structure = frozen.upper(tokens, 1), [*frozen.modules()]

    def interrupt(*_: object) -> None:
        raise error

    with torch.no_grad():
        merged = frozen.merged(given)
        merged.blocks[2].attn.register_forward_hook(interrupt)
        with pytest.raises(error):
            frozen.upper(tokens, 1, [Prefixes(1, normal(2, 2, 4, 3, WIDTH // 3).float())], merged)
    assert torch.equal(frozen.upper(tokens, 1), plain)
    assert all(one is other for one, other in zip(structure, frozen.modules(), strict=True))
    assert not any(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in frozen.modules())


# ---------------------------------------------------------------- prefixes of keys and values


def attention_with_prefix(attention: nn.Module, tokens: Tensor, prefix: Tensor) -> Tensor:
    """The definition, one sample and one head at a time: softmax over the prefix's keys and the tokens' own."""
    heads, size = prefix.shape[3:]
    outputs = []
    for x, (keys, values) in zip(tokens, prefix, strict=True):
        q, k, v = attention.qkv(x).view(len(x), 3, heads, size).unbind(1)
        of_heads = []
        for head in range(heads):
            own_keys = torch.cat([k[:, head], keys[:, head]])
            weights = (q[:, head] @ own_keys.T / math.sqrt(size)).softmax(dim=1)
            of_heads.append(weights @ torch.cat([v[:, head], values[:, head]]))
        outputs.append(attention.proj(torch.cat(of_heads, dim=1)))
    return torch.stack(outputs)


@pytest.mark.parametrize("fused", [True, False])
def test_every_token_also_attends_to_the_prefix(block: nn.Module, fused: bool) -> None:
    block.attn.fused_attn = fused
    tokens, prefix = normal(2, 5, WIDTH), normal(2, 2, 4, 3, WIDTH // 3, seed=8)
    with Prefixes(0, prefix).into(block):
        extended = block.attn(tokens)
        whole = block(tokens)
    assert extended.shape == tokens.shape
    torch.testing.assert_close(extended, attention_with_prefix(block.attn, tokens, prefix), rtol=1e-10, atol=1e-10)
    attended = tokens + attention_with_prefix(block.attn, block.norm1(tokens), prefix)
    torch.testing.assert_close(whole, attended + block.mlp(block.norm2(attended)), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(whole, block(tokens))


def test_the_gradients_of_a_prefix_are_those_of_finite_differences(block: nn.Module) -> None:
    tokens = normal(2, 3, WIDTH).requires_grad_()
    prefix = normal(2, 2, 2, 3, WIDTH // 3, seed=8).requires_grad_()

    def extended(x: Tensor, keys_values: Tensor) -> Tensor:
        with Prefixes(0, keys_values).into(block):
            return block(x)

    assert torch.autograd.gradcheck(extended, (tokens, prefix))


@pytest.mark.parametrize("index", range(DEPTH))
def test_a_prefix_of_no_length_changes_no_bit(frozen: FrozenViT, index: int) -> None:
    images = torch.randint(256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    tokens = frozen.lower(frozen.prepare(images), 0)
    empty = Prefixes(index, torch.zeros(2, 2, 0, 3, WIDTH // 3))
    assert torch.equal(frozen.upper(tokens, 0, [empty]), frozen(images))
    assert torch.equal(frozen.upper(tokens, 0), frozen(images))


def test_a_prefix_and_a_pair_may_share_a_block(block: nn.Module) -> None:
    """Either order gives the same: the pair changes the tokens' keys, the prefix none of them."""
    tokens, prefix, lora = normal(2, 5, WIDTH), normal(2, 2, 4, 3, WIDTH // 3, seed=8), pairs(2)
    one, other = LowRank(0, lora), Prefixes(0, prefix)
    with one.into(block), other.into(block):
        both = block(tokens)
    with other.into(block), one.into(block):
        torch.testing.assert_close(block(tokens), both, rtol=1e-10, atol=1e-10)
    weight = block.attn.qkv.weight
    looped = []
    for n in range(2):
        with torch.no_grad(), Prefixes(0, prefix[n : n + 1]).into(block):
            merged = {"attn.qkv.weight": weight + lora.b[n] @ lora.a[n]}
            looped.append(functional_call(block, merged, (tokens[n : n + 1],)))
    torch.testing.assert_close(both, torch.cat(looped), rtol=1e-10, atol=1e-10)


def test_a_prefix_leaves_no_trace(block: nn.Module) -> None:
    prefix = normal(2, 2, 4, 3, WIDTH // 3, seed=8)
    with pytest.raises(KeyError, match="inside"), Prefixes(0, prefix).into(block):
        raise KeyError("inside")
    with pytest.raises(RuntimeError), Prefixes(0, prefix).into(block):  # prefixes for two samples, three samples
        block(normal(3, 5, WIDTH))
    assert not any(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in block.modules())


# ---------------------------------------------------------------- prompts at the input


def test_prompts_stand_behind_the_class_token_at_its_position(frozen: FrozenViT) -> None:
    images = torch.randint(256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    tokens, prompts = frozen.lower(frozen.prepare(images), 0), normal(2, 3, WIDTH).float()
    longer = frozen.prompted(tokens, prompts)
    assert longer.shape == (2, 5 + 3, WIDTH)
    assert torch.equal(longer[:, :1], tokens[:, :1])
    torch.testing.assert_close(longer[:, 1:4], prompts + frozen.vit.pos_embed[0, 0])
    assert torch.equal(longer[:, 4:], tokens[:, 1:])
    encoded = frozen.encode(longer, 0)
    torch.testing.assert_close(encoded, frozen.vit.norm(frozen.vit.blocks(longer)))
    torch.testing.assert_close(frozen.upper(longer, 0), encoded[:, 0])
    assert torch.equal(frozen.upper(frozen.prompted(tokens, prompts[:, :0]), 0), frozen(images))


@pytest.mark.parametrize(
    ("name", "first"),
    [("deit3_small_patch16_224", 1), ("vit_base_patch16_siglip_224", 0), ("vit_base_patch16_clip_224", 1)],
)
def test_prompts_go_into_other_plain_vits(name: str, first: int) -> None:
    args = {"patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 3}
    vit = FrozenViT(name, image_size=16, model_args=args)
    assert vit.num_prefix_tokens == first
    tokens, prompts = vit.lower(torch.randn(2, 3, 16, 16), 0), torch.randn(2, 3, WIDTH)
    longer = vit.prompted(tokens, prompts)
    own = 0 if first == 0 or vit.vit.no_embed_class else vit.vit.pos_embed[0, 0]
    torch.testing.assert_close(longer[:, first : first + 3], vit.vit.norm_pre(prompts + own))
    assert torch.equal(torch.cat([longer[:, :first], longer[:, first + 3 :]], dim=1), tokens)


def test_the_gradients_of_prompts_are_those_of_finite_differences(frozen: FrozenViT) -> None:
    vit = FrozenViT(
        "vit_tiny_patch16_224", image_size=16, model_args={"patch_size": 8, "embed_dim": 6, "depth": 2, "num_heads": 3}
    )
    vit.double()
    tokens = vit.lower(torch.randn(2, 3, 16, 16, dtype=torch.float64), 0)
    prompts = torch.randn(2, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: vit.encode(vit.prompted(tokens, p), 0), (prompts,))


def test_injections_work_under_autocast(frozen: FrozenViT) -> None:
    tokens = frozen.lower(torch.randn(2, 3, 16, 16), 0)
    prefix = torch.randn(2, 2, 4, 3, WIDTH // 3, requires_grad=True)
    a, b = torch.randn(2, WIDTH, requires_grad=True), torch.randn(3 * WIDTH, 2, requires_grad=True)
    prompts = torch.randn(2, 3, WIDTH, requires_grad=True)
    injections = [Prefixes(1, prefix), LowRank(1, LoRA(a, b), scale=0.1)]
    with torch.no_grad():
        exact = frozen.upper(frozen.prompted(tokens, prompts), 0, injections)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = frozen.upper(frozen.prompted(tokens, prompts), 0, injections)
        (mixed * torch.arange(WIDTH)).sum().backward()
    torch.testing.assert_close(mixed.float(), exact, rtol=0.1, atol=0.1)
    assert all(leaf.grad is not None and bool(leaf.grad.any()) for leaf in (prefix, a, b, prompts))
