"""The frozen ViT is timm's, and stays as it is; the CNN gives unit vectors of the common width."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms import v2

from fedlscl.models import hub
from fedlscl.models.adapters import LoRA, LowRank
from fedlscl.models.cnn import SmallModel, SmallModelSpec
from fedlscl.models.create import resize
from fedlscl.models.stored import SHIPPED
from fedlscl.models.vit import FrozenViT, TrainedViT

TINY = {"patch_size": 8, "embed_dim": 12, "depth": 3, "num_heads": 3}
NAME = "vit_tiny_patch16_224"
NARROW = {"channels": [4, 4, 8, 8]}
SHIPPED_FILE = "vit_glyph_patch8_32.fp16.safetensors"
SHIPPED_ARGS = {"patch_size": 8, "embed_dim": 96, "depth": 12, "num_heads": 3}


def tiny_vit(name: str = NAME, image_size: int = 16, **args: Any) -> FrozenViT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FrozenViT(name, image_size=image_size, model_args={**TINY, **args})


def pictures(count: int, *size: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, *size), generator=rng, dtype=torch.uint8)


# -------------------------------------------------------------------- forward

VARIANTS = [
    (NAME, {}),
    (NAME, {"global_pool": "avg"}),
    ("deit_tiny_distilled_patch16_224", {}),
    ("deit3_small_patch16_224", {}),
    ("vit_small_patch14_reg4_dinov2", {}),
    ("vit_base_patch32_clip_224", {}),
    ("vit_base_patch16_siglip_224", {}),
]


@pytest.mark.parametrize(("name", "args"), VARIANTS)
def test_the_forward_pass_is_timms_own(name: str, args: dict[str, Any]) -> None:
    frozen = tiny_vit(name, **args)
    images = pictures(3, 16, 16)
    prepared = frozen.prepare(images)
    with torch.no_grad():
        expected = frozen.vit(prepared)
    assert expected.shape == (3, frozen.width) == (3, 12)
    torch.testing.assert_close(frozen(images), expected, rtol=1e-5, atol=1e-6)
    assert frozen.depth == 3
    for block in range(frozen.depth):
        tokens = frozen.lower(prepared, block)
        assert torch.equal(frozen.vit.forward_head(frozen.encode(tokens, block), pre_logits=True), expected)
        assert torch.equal(frozen.upper(tokens, block), frozen(images))


@pytest.mark.parametrize("name", [NAME, "deit3_small_patch16_224"])
def test_without_fused_attention_it_is_still_timms_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    frozen = tiny_vit(name)
    assert not any(block.attn.fused_attn for block in frozen.vit.blocks)
    ours = timm.create_model(name, num_classes=0, img_size=16, **TINY).eval()
    assert all(block.attn.fused_attn for block in ours.blocks)
    ours.load_state_dict(frozen.vit.state_dict())
    images = pictures(3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(frozen(images), ours(frozen.prepare(images)), rtol=1e-5, atol=1e-5)


def test_under_autocast_it_is_what_autocast_makes_of_it() -> None:
    frozen = tiny_vit()
    images = pictures(3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = frozen.vit(frozen.prepare(images))
        mixed = frozen(images)
        assert torch.equal(frozen.encode(frozen.lower(frozen.prepare(images), 0), 0)[:, 0], expected)
        torch.testing.assert_close(mixed, expected, rtol=0.01, atol=0.01)
        assert frozen._model().blocks[0].attn.qkv.weight.dtype == torch.bfloat16
        assert frozen._model() is frozen._model()
    assert not torch.equal(frozen(images), mixed)
    assert all(tensor.dtype == torch.float32 for tensor in frozen.state_dict().values())
    assert len(list(frozen.parameters())) == len(list(frozen.vit.parameters()))


def test_what_a_test_asked_for_under_autocast_can_be_trained_through() -> None:
    frozen = tiny_vit()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.inference_mode():
            frozen(pictures(2, 16, 16))
        tokens = frozen.lower(frozen.prepare(pictures(2, 16, 16)), 1).requires_grad_()
        (frozen.upper(tokens, 1) * torch.arange(12)).sum().backward()
    assert tokens.grad is not None


def test_the_tokens_are_those_that_enter_the_block() -> None:
    frozen = tiny_vit()
    entering: list[Tensor] = []
    handle = frozen.vit.blocks[2].register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    prepared = frozen.prepare(pictures(2, 16, 16))
    frozen.vit(prepared)
    handle.remove()
    tokens = frozen.lower(prepared, 2)
    assert tokens.shape == (2, 4 + 1, 12)
    assert torch.equal(tokens, entering[0])


def test_images_are_normalised_with_the_statistics_given_or_timms() -> None:
    images = pictures(2, 16, 16)
    frozen = tiny_vit()
    assert frozen.mean.flatten().tolist() == pytest.approx([0.5, 0.5, 0.5])
    torch.testing.assert_close(frozen.prepare(images), images.float() / 127.5 - 1)
    clip = tiny_vit("vit_base_patch32_clip_224")
    assert clip.mean.flatten().tolist() == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert clip.std.flatten().tolist() == pytest.approx([0.26862954, 0.26130258, 0.27577711])
    own = FrozenViT(NAME, image_size=16, model_args=TINY, mean=[0.0, 0.1, 0.2], std=[1.0, 2.0, 4.0])
    pixels = images.float() / 255
    expected = torch.stack([pixels[:, 0], (pixels[:, 1] - 0.1) / 2, (pixels[:, 2] - 0.2) / 4], dim=1)
    torch.testing.assert_close(own.prepare(images), expected)


def test_a_grey_one_sees_the_mean_of_the_channels_and_no_colour() -> None:
    images = pictures(2, 16, 16)
    means = [0.0, 0.1, 0.2]
    grey = FrozenViT(NAME, image_size=16, model_args=TINY, mean=means, std=[1.0, 2.0, 4.0], grey=True)
    shown = images.float().mean(1) / 255
    expected = torch.stack([shown, (shown - 0.1) / 2, (shown - 0.2) / 4], dim=1)
    torch.testing.assert_close(grey.prepare(images), expected)
    turned = images[:, [2, 0, 1]]
    torch.testing.assert_close(grey(turned), grey(images))
    torch.testing.assert_close(TrainedViT(grey)(turned), grey(images))
    assert not torch.allclose(tiny_vit()(turned), tiny_vit()(images))


# --------------------------------------------------------------------- frozen


def test_it_never_trains() -> None:
    frozen = tiny_vit(drop_path_rate=0.5, proj_drop_rate=0.5, attn_drop_rate=0.5)
    assert frozen.train() is frozen
    nn.Sequential(frozen).train()
    assert not any(module.training for module in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    images = pictures(2, 16, 16)
    assert torch.equal(frozen(images), frozen(images))


def test_gradients_reach_the_pair_and_nothing_else() -> None:
    frozen = tiny_vit()
    prepared = frozen.prepare(pictures(2, 16, 16)).requires_grad_()
    tokens = frozen.lower(prepared, 1)
    assert not tokens.requires_grad
    a, b = torch.randn(2, 2, 12, requires_grad=True), torch.randn(2, 36, 2, requires_grad=True)
    # not the plain sum, whose gradient the closing layer normalisation makes zero
    (frozen.upper(tokens, 1, [LowRank(1, LoRA(a, b))]) * torch.arange(12)).sum().backward()
    assert a.grad is not None
    assert torch.count_nonzero(a.grad) > 0
    assert b.grad is not None
    assert torch.count_nonzero(b.grad) > 0
    assert prepared.grad is None
    assert all(parameter.grad is None for parameter in frozen.parameters())


# -------------------------------------------------------------- shipped weights


def test_the_shipped_weights_are_small_complete_and_finite() -> None:
    assert [file.name for file in SHIPPED.iterdir() if not file.name.startswith(".")] == [SHIPPED_FILE]
    assert (SHIPPED / SHIPPED_FILE).stat().st_size <= 4 * 2**20
    stored = load_file(SHIPPED / SHIPPED_FILE)
    frozen = FrozenViT(NAME, weights=SHIPPED_FILE, image_size=32, model_args=SHIPPED_ARGS)
    assert frozen.depth == 12
    assert frozen.width == 96
    assert frozen.source == SHIPPED_FILE
    assert set(stored) == set(frozen.vit.state_dict())
    for name, tensor in frozen.vit.state_dict().items():
        assert bool(torch.isfinite(tensor).all())
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, stored[name].float())
    features = frozen(pictures(4, 8, 8))
    assert features.shape == (4, 96)
    assert bool(torch.isfinite(features).all())
    assert features.std(dim=0).min() > 1e-3


# ------------------------------------------------------------ weights of a file


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    """The weights of a classifier with 5 classes, trained at 32 pixels, in half precision."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        vit = timm.create_model(NAME, img_size=32, num_classes=5, **TINY)
    with torch.no_grad():
        vit.pos_embed.normal_(generator=torch.Generator().manual_seed(4))
    state = {name: tensor.half().contiguous() for name, tensor in vit.state_dict().items()}
    assert "head.weight" in state
    return state


def write(folder: Path, state: dict[str, Tensor]) -> str:
    save_file(state, folder / "vit.safetensors")
    return str(folder / "vit.safetensors")


def test_a_file_of_the_same_size_is_taken_as_it_is(tmp_path: Path, stored: dict[str, Tensor]) -> None:
    path = write(tmp_path, stored)
    frozen = FrozenViT(NAME, weights=path, image_size=32, model_args=TINY)
    assert "vit.safetensors" in frozen.source
    assert frozen.weights_sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    loaded = frozen.vit.state_dict()
    assert set(loaded) == set(stored) - {"head.weight", "head.bias"}
    for name, tensor in loaded.items():
        assert torch.equal(tensor, stored[name].float())


@pytest.mark.parametrize("image_size", [16, 48, 64])
def test_at_another_size_only_the_position_embedding_is_resampled(
    tmp_path: Path, stored: dict[str, Tensor], image_size: int
) -> None:
    frozen = FrozenViT(NAME, weights=write(tmp_path, stored), image_size=image_size, model_args=TINY)
    loaded = frozen.vit.state_dict()
    side = image_size // 8
    position = stored["pos_embed"].float()
    expected = timm.layers.resample_abs_pos_embed(position, new_size=[side, side], num_prefix_tokens=1)
    assert torch.equal(loaded["pos_embed"], expected)
    grid = position[:, 1:].view(1, 4, 4, 12).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True).permute(0, 2, 3, 1)
    torch.testing.assert_close(loaded["pos_embed"][:, 1:], grid.reshape(1, side * side, 12))
    assert torch.equal(loaded["pos_embed"][:, :1], position[:, :1])
    for name, tensor in loaded.items():
        assert name == "pos_embed" or torch.equal(tensor, stored[name].float())
    assert frozen(pictures(2, 20, 20)).shape == (2, 12)


def bad_states(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    resnet = timm.create_model("resnet18", num_classes=0, **NARROW).state_dict()
    return {
        "empty": {},
        "another model": {name: tensor.contiguous() for name, tensor in resnet.items()},
        "a block missing": {name: tensor for name, tensor in state.items() if not name.startswith("blocks.1.")},
        "a block too many": {**state, "blocks.3.norm1.weight": torch.ones(12)},
        "a foreign name": {**state, "foo": torch.ones(2)},
        "another width": {**state, "pos_embed": torch.ones(1, 17, 13)},
        "no square grid": {**state, "pos_embed": torch.ones(1, 19, 12)},
        "position embedding without batch": {**state, "pos_embed": torch.ones(17, 12)},
        "patch embedding of another width": {**state, "patch_embed.proj.weight": torch.ones(13, 3, 8, 8)},
        "grey patch embedding": {**state, "patch_embed.proj.weight": torch.ones(12, 1, 8, 8)},
        "flat patch embedding": {**state, "patch_embed.proj.weight": torch.ones(5)},
    }


def test_a_file_that_does_not_fit_is_named(tmp_path: Path, stored: dict[str, Tensor]) -> None:
    for state in bad_states(stored).values():
        path = write(tmp_path, state)
        with pytest.raises(ValueError, match=r"^backbone\.weights: '.*vit\.safetensors' does not fit"):
            FrozenViT(NAME, weights=path, image_size=32, model_args=TINY)


@pytest.mark.parametrize("content", [b"", b"hello " * 20, b"\xff" * 100, b"PK\x03\x04" + bytes(100)])
def test_a_file_of_another_format_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^backbone\.weights: '.*weights\.pt' is not a safetensors file"):
        FrozenViT(NAME, weights=str(path), image_size=32, model_args=TINY)


def test_a_missing_file_is_named_with_what_there_is(tmp_path: Path) -> None:
    for absent in ("nowhere.safetensors", str(tmp_path)):
        with pytest.raises(FileNotFoundError, match=rf"^backbone\.weights: no file '.*{SHIPPED_FILE}"):
            FrozenViT(NAME, weights=absent, image_size=32, model_args=TINY)


# ------------------------------------------------------------ first weights of the small model


def small(path: str, image_size: int = 32, **settings: Any) -> SmallModel:
    given = {"features": 12, "image_size": image_size, "weights": path, "model_args": TINY, **settings}
    return SmallModel(SmallModelSpec(name=NAME, **given), NAME)


@pytest.mark.parametrize("image_size", [32, 16, 48])
def test_a_vit_as_small_model_begins_with_what_the_frozen_one_has(
    tmp_path: Path, stored: dict[str, Tensor], image_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, path = record_requests(monkeypatch), write(tmp_path, stored)
    model = small(path, image_size, pretrained=True)
    assert asked == [(NAME, False)]
    frozen = FrozenViT(NAME, weights=path, image_size=image_size, model_args=TINY)
    begun = model.backbone.state_dict()
    assert set(begun) == set(frozen.vit.state_dict())
    assert all(torch.equal(tensor, begun[name]) for name, tensor in frozen.vit.state_dict().items())
    assert isinstance(model.project, nn.Identity)
    images = pictures(3, 20, 20)
    features = F.normalize(frozen(images), dim=1)
    torch.testing.assert_close(model(images), features, rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_cnn_begins_with_the_weights_of_a_file(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        other = timm.create_model("resnet18", num_classes=7, **NARROW)
    path = write(tmp_path, {name: tensor.contiguous() for name, tensor in other.state_dict().items()})
    spec = SmallModelSpec(features=8, image_size=16, weights=path, model_args=NARROW)
    begun = SmallModel(spec, "resnet18").backbone.state_dict()
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in begun.items())
    assert spec.weights_sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    with pytest.raises(
        ValueError, match=r"^cnn\.weights: '.*' does not fit cnn\.name, image_size and model_args: 'bn1\."
    ):
        SmallModel(
            SmallModelSpec(image_size=16, weights=path, model_args={**NARROW, "norm_layer": "groupnorm1"}), "resnet18"
        )


def test_a_file_that_does_not_fit_the_small_model_is_named(tmp_path: Path, stored: dict[str, Tensor]) -> None:
    for state in bad_states(stored).values():
        with pytest.raises(ValueError, match=r"^cnn\.weights: '.*vit\.safetensors' does not fit cnn\.name"):
            small(write(tmp_path, state))
    with pytest.raises(ValueError, match=r"^cnn\.weights: '.*': tensor 'cls_token' holds NaN"):
        small(write(tmp_path, {**stored, "cls_token": torch.full((1, 1, 12), torch.nan)}))
    (tmp_path / "other.pt").write_bytes(b"hello " * 20)
    with pytest.raises(ValueError, match=r"^cnn\.weights: '.*other\.pt' is not a safetensors file"):
        small(str(tmp_path / "other.pt"))
    for absent in ("nowhere.safetensors", str(tmp_path), ""):
        with pytest.raises(FileNotFoundError, match=rf"^cnn\.weights: no file '.*{SHIPPED_FILE}"):
            SmallModelSpec(weights=absent)


def test_each_of_several_cnns_has_a_file_of_its_own_or_none(tmp_path: Path, stored: dict[str, Tensor]) -> None:
    path, names = write(tmp_path, stored), ["resnet18", NAME]
    args = {"resnet18": NARROW, NAME: TINY}
    for wrong in (path, "", {"resnet19": path}):
        with pytest.raises(ValueError, match=r"^cnn\.weights is .*; with a list of names.*\{resnet18: FILE\}"):
            SmallModelSpec(name=names, weights=wrong)
    with pytest.raises(ValueError, match=r"^cnn\.weights is .*, must be one file"):
        SmallModelSpec(name=NAME, weights={NAME: path})
    with pytest.raises(FileNotFoundError, match=r"^cnn\.weights: no file 'nowhere'"):
        SmallModelSpec(name=names, weights={NAME: "nowhere"})
    spec = SmallModelSpec(name=names, features=12, image_size=32, weights={NAME: path}, model_args=args)
    begun = SmallModel(spec, NAME).backbone.state_dict()
    assert torch.equal(begun["cls_token"], stored["cls_token"].float())
    SmallModel(spec, "resnet18")
    before = spec.weights_sha256
    write(tmp_path, {**stored, "cls_token": stored["cls_token"] + 1})
    changed = SmallModelSpec(name=names, weights={NAME: path}).weights_sha256
    assert len({before, changed, None}) == 3
    assert SmallModelSpec(name=names, weights={}).weights_sha256 is None


def test_a_vit_takes_the_arguments_of_a_vit_and_a_cnn_those_of_a_cnn() -> None:
    spec = SmallModelSpec(NAME, image_size=16, model_args={**TINY, "qkv_bias": False})
    assert SmallModel(spec, NAME).backbone.blocks[0].attn.qkv.bias is None
    with pytest.raises(ValueError, match=r"^cnn\.model_args has 'channels', none of those.*num_heads"):
        SmallModel(SmallModelSpec(NAME, image_size=16, model_args=NARROW), NAME)
    with pytest.raises(ValueError, match=r"^cnn\.model_args has 'num_heads', none of those.*channels"):
        SmallModel(SmallModelSpec(image_size=16, model_args={"num_heads": 3}), "resnet18")
    with pytest.raises(ValueError, match=rf"^cnn\.image_size: '{NAME}' cannot take images of 4 px"):
        SmallModel(SmallModelSpec(NAME, image_size=4, model_args=TINY), NAME)


# ------------------------------------------------------------- wrong settings


@pytest.mark.parametrize("name", ["vit_enormous_patch3", "", "swim_tiny", "hub/vit"])
def test_an_unknown_name_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^backbone\.name: timm has no model '{name}'"):
        FrozenViT(name)
    with pytest.raises(ValueError, match=rf"^cnn\.name: timm has no model '{name}'"):
        SmallModel(SmallModelSpec(), name)
    with pytest.raises(ValueError, match=r"similar names: \w*resnet"):
        SmallModel(SmallModelSpec(), "resnet_19")


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "eva02_tiny_patch14_224"])
def test_a_model_that_is_no_plain_vit_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^backbone\.name.*'{name}'"):
        FrozenViT(name)
    with pytest.raises(ValueError, match=r"^backbone\.name: 'vit_small_patch16_18x2_224' is not a plain ViT"):
        tiny_vit("vit_small_patch16_18x2_224")  # its parallel blocks have no single attention to adapt


def test_an_unknown_pretrained_tag_is_named() -> None:
    with pytest.raises(ValueError, match=rf"^backbone\.name.*{NAME}\.nonsense"):
        tiny_vit(f"{NAME}.nonsense")
    with pytest.raises(ValueError, match=r"^cnn\.name.*resnet18\.nonsense"):
        SmallModel(SmallModelSpec(), "resnet18.nonsense")


def test_an_unknown_argument_of_the_model_is_named() -> None:
    with pytest.raises(ValueError, match=r"^backbone\..*'breadth'"):
        tiny_vit(breadth=3)
    with pytest.raises(ValueError, match=r"^cnn\..*'breadth'"):
        SmallModel(SmallModelSpec(image_size=16, model_args={"breadth": 3}), "resnet18")


def record_requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """From here on timm makes untrained models; the list gets every name with whether pretrained was asked for."""
    asked: list[tuple[str, bool]] = []
    create = timm.create_model

    def without_network(name: str, pretrained: bool, **args: Any) -> nn.Module:
        asked.append((name, pretrained))
        return create(name, pretrained=False, **args)

    monkeypatch.setattr(timm, "create_model", without_network)
    monkeypatch.setattr(hub, "cached", lambda repository: True)
    return asked


def test_where_there_is_no_hub_it_is_asked_once_and_a_file_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = record_requests(monkeypatch)
    monkeypatch.setattr(hub, "cached", lambda repository: False)
    repositories: list[str] = []
    monkeypatch.setattr(hub, "unreachable", lambda repository: repositories.append(repository) or "it is far away")
    with pytest.raises(ValueError, match=r"backbone.pretrained: .* \(it is far away\); .* --backbone.weights FILE"):
        FrozenViT(NAME, pretrained=True, image_size=16, model_args=TINY)
    assert asked == []
    assert len(repositories) == 1
    assert repositories[0].startswith(f"timm/{NAME}.")


def test_pretrained_weights_are_asked_for_only_where_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = record_requests(monkeypatch)
    assert "timm" in FrozenViT(NAME, pretrained=True, image_size=16, model_args=TINY).source
    tiny_vit()
    for pretrained in (True, False):
        SmallModel(SmallModelSpec(image_size=16, pretrained=pretrained, model_args=NARROW), "resnet18")
    assert asked == [(NAME, True), (NAME, False), ("resnet18", True), ("resnet18", False)]


def test_a_file_of_weights_stands_in_for_pretrained_ones(
    tmp_path: Path, stored: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = record_requests(monkeypatch)
    path = write(tmp_path, stored)
    frozen = FrozenViT(NAME, pretrained=True, weights=path, image_size=32, model_args=TINY)
    assert asked == [(NAME, False)]
    assert "vit.safetensors" in frozen.source
    assert torch.equal(frozen.vit.cls_token, stored["cls_token"].float())


# ------------------------------------------------------------------ the small CNN


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("resnet18", {"channels": [16, 16, 16, 24]}),
        ("resnet18", {"channels": [16, 16, 16, 16]}),
        ("mobilenetv3_small_050", {}),
        ("regnetx_002", {}),
    ],
)
def test_every_cnn_gives_unit_vectors_of_the_common_width(name: str, args: dict[str, Any]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SmallModel(SmallModelSpec(features=24, image_size=32, model_args=args), name).eval()
    images = pictures(3, 20, 20)
    features = model(images)
    assert features.shape == (3, 24)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    x = (resize(images, 32) - model.mean) / model.std
    raw = model.project(model.backbone(x))
    torch.testing.assert_close(features, raw / raw.square().sum(dim=1, keepdim=True).sqrt())
    features[:, 0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_linear_map_only_where_the_width_differs() -> None:
    def small(channels: list[int]) -> SmallModel:
        return SmallModel(SmallModelSpec(features=24, image_size=16, model_args={"channels": channels}), "resnet18")

    assert isinstance(small([4, 4, 8, 24]).project, nn.Identity)
    assert small([4, 4, 8, 8]).project.weight.shape == (24, 8)
    model = SmallModel(SmallModelSpec(features=24, image_size=32), "mobilenetv3_small_050")
    assert (model.backbone.num_features, model.project.in_features) == (288, 1024)  # what timm says, what comes out


def test_statistics_are_no_part_of_what_is_stored_or_sent() -> None:
    model = SmallModel(SmallModelSpec(features=8, image_size=16, model_args=NARROW), "resnet18")
    assert not {"mean", "std"} & set(model.state_dict())
    assert not {"mean", "std"} & set(tiny_vit().state_dict())
    assert model.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


def test_images_too_small_for_the_cnn_are_named() -> None:
    with pytest.raises(ValueError, match=r"^cnn\.image_size: 'convnext_atto' cannot take images of 2 px"):
        SmallModel(SmallModelSpec(image_size=2), "convnext_atto")
    with pytest.raises(ValueError, match=r"^cnn\.image_size is 0, must be 1 to 4096 pixels"):
        SmallModelSpec(image_size=0)


def test_a_model_without_one_vector_per_image_is_named() -> None:
    with pytest.raises(ValueError, match=r"^cnn\.name: 'resnet18' gives an output of shape \(1, 8, 1, 1\)"):
        SmallModel(SmallModelSpec(image_size=16, model_args={**NARROW, "global_pool": ""}), "resnet18")


def test_one_name_or_one_for_each_client() -> None:
    one = SmallModelSpec(name="resnet18")
    one.check(7)
    assert [one.name_of(k) for k in range(3)] == ["resnet18"] * 3
    several = SmallModelSpec(name=["resnet18", "regnetx_002"])
    several.check(2)
    assert [several.name_of(k) for k in range(2)] == ["resnet18", "regnetx_002"]
    for clients in (1, 3):
        with pytest.raises(ValueError, match=rf"^cnn\.name lists 2 models for {clients} clients"):
            several.check(clients)


def test_each_of_several_cnns_has_arguments_of_its_own() -> None:
    own = {"channels": [4, 4, 8, 8], "layers": [1, 1, 1, 1]}
    spec = SmallModelSpec(name=["resnet18", "regnetx_002"], image_size=16, model_args={"resnet18": own})
    spec.check(2)
    assert SmallModel(spec, "resnet18").backbone.num_features == 8
    plain = timm.create_model("regnetx_002", num_classes=0)
    shapes = {name: value.shape for name, value in plain.state_dict().items()}
    mine = {name: value.shape for name, value in SmallModel(spec, "regnetx_002").backbone.state_dict().items()}
    assert mine == shapes
    for wrong in ({"norm_layer": "groupnorm"}, {"resnet18": "groupnorm"}, {"resnet": {}}):
        spec = SmallModelSpec(name=["resnet18", "regnetx_002"], model_args=wrong)
        with pytest.raises(ValueError, match=r"^cnn\.model_args is .*each under its name, such as {resnet18: "):
            spec.check(2)


# ----------------------------------------------------------------------- resize


SHAPES = [(40, 40), (23, 40), (8, 8), (5, 9), (64, 48)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [16, 33])
def test_resizing_is_torchvisions_bicubic_with_antialiasing(shape: tuple[int, int], size: int) -> None:
    images = pictures(2, *shape, seed=1) // 4 + 96  # so little contrast that nothing overshoots 0..255 on the way
    ours = resize(images, size)
    reference = v2.functional.resize(images, [size, size], v2.InterpolationMode.BICUBIC, antialias=True)
    assert ours.dtype == torch.float32
    assert ours.shape == (2, 3, size, size)
    assert (ours - reference.float() / 255).abs().max() <= 1.25 / 255  # it rounds twice: after rows, after columns


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [16, 33])
def test_resizing_is_pillows_bicubic_in_floating_point(shape: tuple[int, int], size: int) -> None:
    images = pictures(2, *shape, seed=1)
    images[1, :, : shape[0] // 2] = 0  # a hard edge, where bicubic weights overshoot
    images[1, :, shape[0] // 2 :] = 255
    planes = images.view(6, *shape).numpy().astype(np.float32)
    resized = [Image.fromarray(plane).resize((size, size), Image.Resampling.BICUBIC) for plane in planes]
    reference = torch.from_numpy(np.stack([np.asarray(plane) for plane in resized])).view(2, 3, size, size) / 255
    assert reference.min() < 0
    torch.testing.assert_close(resize(images, size), reference.clamp(0, 1), rtol=0, atol=1e-5)


def test_images_of_the_right_size_keep_their_pixels() -> None:
    images = pictures(2, 16, 16)
    assert torch.equal(resize(images, 16), images.float() / 255)
    assert images.dtype == torch.uint8


@pytest.mark.parametrize(("size", "low"), [(16, False), (32, True)])
def test_a_cnn_that_strides_beyond_its_image_computes_in_float32_on_a_cpu(size: int, low: bool) -> None:
    """The gradient of such a convolution in bf16 would hold whatever was in memory."""
    spec = SmallModelSpec("resnet18", 8, size, model_args={"channels": [4, 4, 8, 8]})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SmallModel(spec, "resnet18").train()
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            features = model(pictures(3, 8, 8))
        model.zero_grad()
        features[:, 0].sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    equal = all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert equal is not low
