"""The last block for the tokens that are read alone gives what the whole block gives for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fedlscl.models.adapters import Injection, LoRA, LowRank, Prefixes
from fedlscl.models.last_block import serves
from fedlscl.models.vit import FrozenViT

NAME, WIDTH, HEADS, DEPTH, BATCH = "vit_tiny_patch16_224", 12, 3, 2, 3
LAST = DEPTH - 1
SIZES = {"attn.qkv": (12, 36), "attn.proj": (12, 12), "mlp.fc1": (12, 48), "mlp.fc2": (48, 12)}


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(name: str = NAME, **args: Any) -> FrozenViT:
    """A ViT whose every number is drawn, also those that begin as zeros or ones."""
    given = {"patch_size": 8, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, **args}
    frozen = FrozenViT(name, image_size=16, model_args=given).double()
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in frozen.vit.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
    return frozen


@pytest.fixture(scope="module")
def plain() -> FrozenViT:
    return make()


def whole(frozen: FrozenViT, tokens: Tensor, injections: list[Injection], merged: Any = None) -> Tensor:
    """The features by way of all tokens that leave the last block."""
    encoded = frozen.encode(tokens, 0, injections, merged)
    features: Tensor = frozen.vit.forward_head(encoded, pre_logits=True)
    return features


def entering(frozen: FrozenViT) -> Tensor:
    return frozen.lower(normal(BATCH, 3, 16, 16, seed=2), 0)


def operations(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return int(counter.get_total_flops())


def pair(layer: str = "attn.qkv", batch: tuple[int, ...] = (), rank: int = 2, block: int = LAST) -> LowRank:
    inside, outside = SIZES[layer]
    a, b = normal(*batch, rank, inside, seed=3), normal(*batch, outside, rank, seed=4 + rank)
    return LowRank(block, LoRA(a.requires_grad_(), b.requires_grad_()), layer, 0.3)


def prefix(length: int = 4, block: int = LAST) -> Prefixes:
    return Prefixes(block, normal(BATCH, 2, length, HEADS, WIDTH // HEADS, seed=length).requires_grad_())


def leaves(injections: list[Injection]) -> list[Tensor]:
    return [t for i in injections for t in (i.lora if isinstance(i, LowRank) else [i.keys_values])]  # type: ignore[attr-defined]


INJECTIONS: dict[str, Callable[[], list[Injection]]] = {
    "nothing": list,
    **{f"{layer}, for all": lambda layer=layer: [pair(layer)] for layer in SIZES},  # type: ignore[misc]
    **{f"{layer}, per sample": lambda layer=layer: [pair(layer, (BATCH,))] for layer in SIZES},  # type: ignore[misc]
    "two in one layer": lambda: [pair(batch=(BATCH,)), pair(rank=3)],
    "a prefix": lambda: [prefix()],
    "everything": lambda: [prefix(), *map(pair, SIZES), pair(batch=(BATCH,)), pair(block=0), prefix(2, block=0)],
}


@pytest.mark.parametrize("args", [{}, {"qk_norm": True}, {"qkv_bias": False}], ids=str)
@pytest.mark.parametrize("what", INJECTIONS)
def test_with_whatever_acts_inside_features_and_gradients_are_those_of_the_whole_block(
    args: dict[str, Any], what: str
) -> None:
    frozen, injections = make(**args), INJECTIONS[what]()
    tokens = entering(frozen).requires_grad_()
    upstream, inputs = normal(BATCH, WIDTH, seed=9), [tokens, *leaves(injections)]
    found, wanted = frozen.upper(tokens, 0, injections), whole(frozen, tokens, injections)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad((features * upstream).sum(), inputs) for features in (found, wanted)]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
        assert float(mine.abs().max()) > 1e-6
    for one in injections:  # or else the comparison would show nothing
        assert not torch.allclose(found, frozen.upper(tokens, 0, [i for i in injections if i is not one]))


CLASS_TOKEN: list[tuple[str, dict[str, Any], int]] = [
    (NAME, {}, 1),
    (NAME, {"qk_norm": True}, 1),
    (NAME, {"qkv_bias": False, "proj_bias": False}, 1),
    (NAME, {"init_values": 0.1, "scale_attn_norm": True, "scale_mlp_norm": True}, 1),
    (NAME, {"reg_tokens": 4, "pre_norm": True, "norm_layer": "rmsnorm"}, 1),
    (NAME, {"fc_norm": True, "drop_path_rate": 0.5, "attn_drop_rate": 0.5, "proj_drop_rate": 0.5, "drop_rate": 0.5}, 1),
    (NAME, {"final_norm": False, "num_heads": 1, "depth": 1}, 1),
    ("deit3_small_patch16_224", {}, 1),
    ("deit_tiny_distilled_patch16_224", {}, 2),  # the mean of two tokens
    ("vit_small_patch14_reg4_dinov2", {}, 1),
    ("vit_base_patch32_clip_224", {}, 1),
]
ALL_TOKENS: list[tuple[str, dict[str, Any]]] = [
    *((NAME, {"global_pool": pool}) for pool in ("avg", "max", "avgmax", "map")),
    (NAME, {"global_pool": "avg", "pool_include_prefix": True}),
    (NAME, {"global_pool": "avg", "class_token": False, "reg_tokens": 2}),
    ("vit_base_patch16_siglip_224", {}),
]


@pytest.mark.parametrize(("name", "args", "read"), CLASS_TOKEN, ids=str)
def test_every_plain_vit_gives_the_features_of_the_whole_block(name: str, args: dict[str, Any], read: int) -> None:
    frozen = make(name, **args)
    tokens, injections = entering(frozen), [] if frozen.depth == 1 else [pair(), prefix()]
    torch.testing.assert_close(
        frozen.upper(tokens, 0, injections), whole(frozen, tokens, injections), rtol=1e-10, atol=1e-10
    )
    images = torch.randint(256, (BATCH, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    torch.testing.assert_close(frozen(images), frozen.vit(frozen.prepare(images)), rtol=1e-10, atol=1e-10)
    # no other token leaves the last block
    seen: list[Tensor] = []
    handle = frozen.vit.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    frozen.upper(tokens, 0)
    handle.remove()
    assert [list(tensor.shape) for tensor in seen] == [[BATCH, read, WIDTH]]
    single = frozen.float()
    torch.testing.assert_close(single(images), single.vit(single.prepare(images)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "args"), ALL_TOKENS, ids=str)
def test_where_all_tokens_make_the_features_the_block_is_whole(name: str, args: dict[str, Any]) -> None:
    frozen = make(name, **args)
    tokens, injections = entering(frozen), [pair(batch=(BATCH,)), prefix()]
    assert torch.equal(frozen.upper(tokens, 0, injections), whole(frozen, tokens, injections))
    blocks = operations(lambda: frozen.vit.blocks(tokens))
    assert operations(lambda: frozen.upper(tokens, 0)) >= blocks


class Listening:
    """Hears what enters a layer of the last block."""

    block = LAST

    def __init__(self) -> None:
        self.heard: list[Tensor] = []

    @contextmanager
    def into(self, block: nn.Module) -> Iterator[None]:
        """Listen."""
        handle = block.get_submodule("mlp.fc1").register_forward_pre_hook(lambda _, x: self.heard.append(x[0]))
        yield
        handle.remove()


def test_what_acts_inside_in_a_way_of_its_own_finds_all_tokens(plain: FrozenViT) -> None:
    tokens, listening = entering(plain), Listening()
    found = plain.upper(tokens, 0, [pair(), listening])
    assert [list(tensor.shape) for tensor in listening.heard] == [[BATCH, 5, WIDTH]]
    torch.testing.assert_close(found, plain.upper(tokens, 0, [pair()]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_the_first_tokens_are_the_first_of_all(plain: FrozenViT, count: int) -> None:
    tokens, injections = entering(plain), [pair(batch=(BATCH,)), prefix()]
    everything = plain.encode(tokens, 0, injections)
    assert everything.shape[1] == 5
    found = plain.encode(tokens, 0, injections, count=count)
    torch.testing.assert_close(found, everything[:, :count], rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_merged_pairs_act_in_the_last_block(plain: FrozenViT) -> None:
    tokens, pairs = entering(plain), [*map(pair, SIZES), pair(block=0)]
    merged = plain.merged(pairs)
    found = plain.upper(tokens, 0, [prefix()], merged)
    torch.testing.assert_close(found, whole(plain, tokens, [*pairs, prefix()]), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(found, plain.upper(tokens, 0, [prefix()]))


def test_under_autocast_it_is_about_the_same(plain: FrozenViT) -> None:
    frozen = make().float()
    tokens = entering(plain).float()
    injections = [
        Prefixes(LAST, prefix().keys_values.float()),
        LowRank(LAST, LoRA(*(tensor.float() for tensor in pair(batch=(BATCH,)).lora)), scale=0.3),
    ]
    exact = frozen.upper(tokens, 0, injections)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, other = frozen.upper(tokens, 0, injections), whole(frozen, tokens, injections)
    assert mixed.dtype == other.dtype
    torch.testing.assert_close(mixed.float(), exact, rtol=0.1, atol=0.1)


def test_nothing_is_left_in_the_block_when_it_fails(plain: FrozenViT) -> None:
    with pytest.raises(RuntimeError):  # pairs for two samples, three samples
        plain.upper(entering(plain), 0, [pair(), pair("mlp.fc1", (2,))])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())


def test_blocks_of_another_kind_are_computed_as_a_whole() -> None:
    frozen = FrozenViT(
        NAME,
        image_size=16,
        model_args={"patch_size": 8, "embed_dim": 12, "num_heads": 3, "depth": 1},
    )
    block = frozen.vit.blocks[0]
    assert serves(block, [])

    class Other(type(block)):  # type: ignore[misc]
        pass

    block.__class__ = Other
    assert not serves(block, [])
    tokens = frozen.lower(torch.randn(2, 3, 16, 16), 0)
    assert torch.equal(frozen.upper(tokens, 0), frozen.encode(tokens, 0)[:, 0])


@pytest.mark.parametrize("pairs", [0, 1])
def test_the_operations_of_the_last_block_by_hand(plain: FrozenViT, pairs: int) -> None:
    """T tokens, n = 1 of them read: with a pair of rank r q, W_k^T q and values cost r (d + d) more each."""
    injections = [pair(batch=(BATCH,)) for _ in range(pairs)]
    tokens = entering(plain)
    d, rows, rank = WIDTH, 5, 2
    last = d * d + 2 * HEADS * rows * d + 2 * d * d + d * d + 8 * d * d
    low = (rank * d + d * rank) + 2 * (d * rank + HEADS * rank * d)
    assert operations(lambda: plain.upper(tokens, LAST, injections)) == 2 * BATCH * (last + pairs * low)
    block = 12 * rows * d * d + 2 * rows * rows * d
    assert operations(lambda: plain.encode(tokens, LAST)) == 2 * BATCH * block
