"""The frozen foundation model that every client holds: a plain ViT of timm.

Shapes: B batch, T tokens, S input size in pixels, d ViT width.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fedlscl import seeds
from fedlscl.checks import at_least
from fedlscl.checks import path as path_of
from fedlscl.models.adapters import Injection, LowRank
from fedlscl.models.create import check_args, check_image_size, check_patches, create, outline, reason, resize
from fedlscl.models.last_block import first_tokens, serves
from fedlscl.models.stored import load_weights, weights_sha256

VIT_ARGS = frozenset(
    {
        *("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "proj_bias", "init_values"),
        *("qk_norm", "scale_attn_norm", "scale_mlp_norm", "pre_norm", "final_norm", "fc_norm", "embed_norm_layer"),
        *("class_token", "reg_tokens", "pos_embed", "no_embed_class", "global_pool", "pool_include_prefix"),
        *("act_layer", "norm_layer"),
        # without effect where it never trains
        *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
    }
)
"""The arguments of timm's VisionTransformer that `model_args` may give."""

WIDEST_STD = 5.0
"""Deviation above which it is taken for one of pixels in 0..255; where nothing is to be scaled it is 1."""

PLAIN = (
    "vit_base_patch16_224.augreg_in21k, vit_base_patch16_clip_224, vit_small_patch14_dinov2 or deit_base_patch16_224"
)
OTHERS = {
    "Eva": "it has rotary position embeddings or blocks of another layout, as EVA, DINOv3 and PE have",
    "VisionTransformerRelPos": "it has relative position embeddings",
    "VisionTransformerSAM": "it has windows and relative positions",
    "NaFlexVit": "it takes images of any size as sequences of patches",
}
"""What else than a plain ViT a model of timm is, by its class."""


class FrozenViT(nn.Module):
    """A timm plain ViT without its classifier: evaluation mode, no gradients for its parameters.

    One object serves every client of a process; it is part of no checkpoint and no message.

    Args:
        name: any plain ViT of timm, optionally with a pretrained tag, such as vit_base_patch16_224.augreg_in21k.
        pretrained: load timm's weights for this name, from its hub or cache.
        weights: load this safetensors file instead: a path, or the name of a file shipped in fedlscl/models/weights.
        image_size: side of the square input in pixels; the position embedding is resampled to it.
        model_args: arguments of timm's VisionTransformer (see `VIT_ARGS`), for instance embed_dim and depth of a model
            of your own.
        mean: the three channels' means of the input pixels in 0..1; by default what timm states for this name.
        std: the three channels' deviations of the input pixels in 0..1; by default what timm states for this name.
        grey: show it the mean of the channels in each of them, as a model that was pretrained on grey images has seen.
        cache_mib: memory for what the frozen blocks compute, once for each image; 0 computes it in every step.
    """

    mean: Tensor
    std: Tensor
    weights_sha256: str | None  # of the file of weights, where there is one

    def __init__(
        self,
        name: str = "vit_base_patch16_224.augreg_in21k",
        pretrained: bool = False,
        weights: str | None = None,
        image_size: int = 224,
        model_args: dict[str, Any] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        grey: bool = False,
        cache_mib: float = 4096,
    ) -> None:
        from timm.data.config import resolve_model_data_config  # takes seconds, which only building a model is worth

        super().__init__()
        at_least(0, "backbone", cache_mib=cache_mib)
        check_image_size("backbone", image_size)
        check_args("backbone", model_args or {}, VIT_ARGS)
        _check_statistics(mean, std)
        self.grey, self.cache_mib = grey, cache_mib
        model_args = {"img_size": image_size, **(model_args or {})}
        _check_kind(name, image_size, json.dumps(model_args))
        with seeds.seeded(0, "backbone"):  # untrained weights too are the same in every run, and when predicting
            vit: Any = create("backbone", name, pretrained and weights is None, model_args)
        if weights is not None:
            load_weights("backbone", vit, weights)
        self.weights_sha256 = weights_sha256("backbone", weights)
        self.name, self.image_size = name, image_size
        self.source = path_of(weights).name if weights else "pretrained by timm" if pretrained else "untrained"
        self.vit: Any = vit
        self.width, self.depth = int(vit.embed_dim), len(vit.blocks)
        blocks: Any = vit.blocks
        self.heads, self.num_prefix_tokens = int(blocks[0].attn.num_heads), int(vit.num_prefix_tokens)
        for block in blocks:
            # On a CPU the backward pass of torch's fused attention takes longer than all the rest of a block
            block.attn.fused_attn = torch.cuda.is_available()
        statistics = resolve_model_data_config(vit)
        self.register_buffer("mean", torch.tensor(mean or statistics["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std or statistics["std"]).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()
        self._pooled = _pooled(vit)
        self._low: tuple[object, Any] = (None, None)

    def _model(self) -> Any:
        """The ViT, under autocast with its linear layers in autocast's dtype: it would convert them in every step."""
        device = self.mean.device
        if not torch.is_autocast_enabled(device.type):
            return self.vit
        wanted = (device, torch.get_autocast_dtype(device.type))
        if self._low[0] != wanted:
            with torch.inference_mode(False):  # training uses what a test may have asked for first
                vit = copy.deepcopy(self.vit)
                for module in vit.modules():
                    if isinstance(module, nn.Linear):
                        module.to(wanted[1])
            self._low = (wanted, vit)  # a tuple keeps it out of the module tree
        return self._low[1]

    def merged(self, pairs: Sequence[LowRank]) -> Any:
        """The ViT with LoRA pairs, each for all samples, in copies of the weights that they adapt: for `upper` to use.

        All other weights are this model's own, and nothing of it is changed. The sums are taken in the weights' dtype
        and then, under autocast, rounded to autocast's: it is made for the device and the precision of now.
        """
        model, weights = self._model(), dict[tuple[int, str], Tensor]()
        with torch.no_grad(), torch.autocast(self.mean.device.type, enabled=False):
            for pair in pairs:
                place = pair.block, pair.layer
                before = weights.get(place, self.vit.blocks[pair.block].get_submodule(pair.layer).weight)
                a, b = (factor.to(before.dtype) for factor in pair.lora)
                weights[place] = torch.addmm(before, b, a, alpha=pair.scale)
        merged = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
        for (block, layer), weight in weights.items():
            module = merged.blocks[block].get_submodule(layer)
            module.weight = nn.Parameter(weight.to(module.weight.dtype), requires_grad=False)
        return merged

    def train(self, mode: bool = True) -> FrozenViT:
        """Stay in evaluation mode, whatever is asked."""
        return super().train(False)

    def move_to(self, device: torch.device) -> None:
        """Be on this device, which costs nothing where that is so already."""
        if self.mean.device != device:
            self.to(device)

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) to normalised float (B, 3, S, S)."""
        return (_shown(images, self.image_size, self.grey) - self.mean) / self.std

    def lower(self, x: Tensor, block: int) -> Tensor:
        """Tokens (B, T, d) that enter `block`, from prepared images; nothing trained has a part in them."""
        vit = self._model()
        with torch.no_grad():
            tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))
            entering: Tensor = vit.blocks[:block](tokens)
        return entering

    def projected(self, tokens: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """What a block's qkv projection is given (B, T, d) and gives (B, T, 3 d), for tokens that enter the block."""
        inside = self._model().blocks[block]
        given = inside.norm1(tokens)
        return given, inside.attn.qkv(given)

    def prompted(self, tokens: Tensor, prompts: Tensor) -> Tensor:
        """Tokens (B, T + L, d) that enter block 0, with prompts (B, L, d) right behind the class token.

        They are at the class token's position, and stand in the places `num_prefix_tokens` to `num_prefix_tokens + L`.
        """
        vit, first = self._model(), self.num_prefix_tokens
        if first and vit.pos_embed is not None and not vit.no_embed_class:
            prompts = prompts + vit.pos_embed[:, :1]
        return torch.cat([tokens[:, :first], vit.norm_pre(prompts).to(tokens.dtype), tokens[:, first:]], dim=1)

    def encode(
        self,
        tokens: Tensor,
        block: int,
        injections: Sequence[Injection] = (),
        merged: Any = None,
        count: int | None = None,
    ) -> Tensor:
        """All tokens (B, T, d) as they leave the last block, normalised, from those that enter `block`.

        Args:
            tokens: (B, T, d).
            block: the first block that they pass.
            injections: what acts inside the blocks.
            merged: what `merged` has made, to be used in the place of this model.
            count: return the first tokens alone, so many of them; in the last block the work is for these only.

        Raises:
            ValueError: an injection is for a block that these tokens do not pass.
        """
        vit, last = self._model() if merged is None else merged, self.depth - 1
        inside = [injection for injection in injections if injection.block == last]
        with ExitStack() as stack:
            for injection in injections:
                if not block <= injection.block <= last:
                    raise ValueError(
                        f"something is to be injected into block {injection.block}, but these tokens pass blocks "
                        f"{block} to {last}"
                    )
                if injection.block < last:
                    stack.enter_context(injection.into(vit.blocks[injection.block]))
            tokens = vit.blocks[block:last](tokens)
            if count is not None and block <= last and serves(vit.blocks[last], inside):
                tokens = first_tokens(vit.blocks[last], tokens, count, inside)
            else:
                for injection in inside:
                    stack.enter_context(injection.into(vit.blocks[last]))
                tokens = vit.blocks[max(block, last) :](tokens)[:, :count]
            encoded: Tensor = vit.norm(tokens)
        return encoded

    def upper(self, tokens: Tensor, block: int, injections: Sequence[Injection] = (), merged: Any = None) -> Tensor:
        """Features (B, d) from the tokens that enter `block`; see `encode`."""
        vit = self._model() if merged is None else merged
        encoded = self.encode(tokens, block, injections, merged, self._pooled)
        features: Tensor = vit.forward_head(encoded, pre_logits=True)
        return features

    def summaries(self, images: Tensor, blocks: int) -> Tensor:
        """Class token and mean patch token (B, 2 n, d) behind each of the last n blocks, normalised as behind the last.

        Args:
            images: uint8 (B, 3, H, W).
            blocks: n; the order is that of the blocks, the class token of each first.
        """
        first = self.depth - blocks
        return self.summarised(self.lower(self.prepare(images), first), first, blocks)

    def summarised(self, tokens: Tensor, block: int, blocks: int, merged: Any = None) -> Tensor:
        """The same (B, 2 n, d) from the tokens (B, T, d) that enter `block`, also of what `merged` has made."""
        vit, parts = self._model() if merged is None else merged, list[Tensor]()
        for number in range(block, self.depth):
            tokens = vit.blocks[number](tokens)
            if number >= self.depth - blocks:
                normalised = vit.norm(tokens)
                parts += [normalised[:, 0], normalised[:, self.num_prefix_tokens :].mean(dim=1)]
        return torch.stack(parts, dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Frozen features (B, d) of uint8 images (B, 3, H, W)."""
        return self.upper(self.lower(self.prepare(images), 0), 0)


class TrainedViT(nn.Module):
    """A ViT that begins with the weights of a frozen one, and is trained as a whole.

    Args:
        frozen: the frozen one, of which this is a copy.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, frozen: FrozenViT) -> None:
        super().__init__()
        self.vit = copy.deepcopy(frozen.vit).requires_grad_(True).train().cpu()
        self.image_size, self.grey = frozen.image_size, frozen.grey
        for name in ("mean", "std"):
            self.register_buffer(name, getattr(frozen, name).cpu(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, d) in float32, of uint8 images (B, 3, H, W)."""
        x = (_shown(images, self.image_size, self.grey) - self.mean) / self.std
        features: Tensor = self.vit(x)
        return features.float()


def _shown(images: Tensor, size: int, grey: bool) -> Tensor:
    """uint8 (B, 3, H, W) as float (B, 3, S, S) in 0..1, in colours or grey."""
    shown = resize(images, size)
    return shown.mean(1, keepdim=True).expand_as(shown) if grey else shown


def _pooled(vit: Any) -> int | None:
    """How many of the first tokens make the features, as the class token alone; None where all tokens do."""
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    if type(vit) is VisionTransformerDistilled:
        return 2  # their mean
    return 1 if type(vit) is VisionTransformer and vit.attn_pool is None and vit.global_pool == "token" else None


def _check_statistics(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Refuse what cannot be the statistics of pixels in 0..1."""
    for name, values, most in (("mean", mean, 1.0), ("std", std, WIDEST_STD)):
        if values is None:
            continue
        if len(values) != 3:
            raise ValueError(f"backbone.{name} is {values}, must be three numbers, one for each channel")
        if not all(0 <= value <= most and (value > 0 or name == "mean") for value in values):
            least = "from 0" if name == "mean" else "above 0 and"
            raise ValueError(
                f"backbone.{name} is {values}, must be numbers {least} to {most:g}, for pixels in 0..1; divide by 255 "
                "what is meant for pixels in 0..255"
            )


@cache
def _check_kind(name: str, image_size: int, model_args: str) -> None:
    """Refuse what is not a plain ViT or cannot take the images, before a single weight is made; once in a process.

    Args:
        name: of the ViT.
        image_size: side of the images in pixels.
        model_args: arguments of its constructor, as JSON.
    """
    from timm.models.vision_transformer import VisionTransformer

    vit: Any = outline("backbone", name, json.loads(model_args))
    problem = None
    if not isinstance(vit, VisionTransformer):
        problem = OTHERS.get(type(vit).__name__, f"it is a {type(vit).__name__}")
    elif not len(vit.blocks):
        raise ValueError("backbone.model_args.depth is 0, must be at least 1")
    elif not hasattr(getattr(vit.blocks[0], "attn", None), "qkv"):
        problem = f"its blocks ({type(vit.blocks[0]).__name__}) have attention of another layout"
    if problem:
        raise ValueError(f"backbone.name: '{name}' is not a plain ViT: {problem}; plain ones work, such as {PLAIN}")
    check_patches("backbone", name, vit, image_size)
    try:
        features = vit.eval()(torch.zeros(1, 3, image_size, image_size, device="meta"))
    except Exception as error:  # whatever an odd combination of arguments leads to
        raise ValueError(
            f"backbone.image_size, backbone.model_args: '{name}' cannot take images of {image_size} px like that "
            f"({reason(error)})"
        ) from error
    if tuple(features.shape) != (1, vit.embed_dim):
        raise ValueError(
            f"backbone.model_args: '{name}' gives an output of shape {tuple(features.shape)} like that, must be "
            f"{(1, vit.embed_dim)}, a vector for each image"
        )
