"""The small model of every client: a CNN of timm, or a ViT.

Shapes: B batch, S input size in pixels, e feature width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlscl.models.create import check_args, check_image_size, check_patches, create, reason, resize
from fedlscl.models.stored import find_weights, load_weights, weights_sha256
from fedlscl.models.vit import VIT_ARGS

CNN_ARGS = frozenset(
    {
        *("layers", "channels", "depths", "dims", "widths", "width", "width_factor", "embed_dim", "num_features"),
        *("block_config", "growth_rate", "bn_size", "cardinality", "base_width", "block_reduce_first", "mlp_ratio"),
        *("stem_type", "stem_width", "stem_chs", "stem_size", "stem_kernel_size", "fix_stem", "replace_stem_pool"),
        *("patch_size", "kernel_sizes", "down_kernel_size", "output_stride", "avg_down", "aa_layer", "pad_type"),
        *("conv_mlp", "conv_bias", "use_grn", "ls_init_value", "zero_init_last", "act_layer", "norm_layer"),
        *("drop_rate", "drop_path_rate", "drop_block_rate", "global_pool"),
    }
)
"""The arguments of timm's CNNs that `cnn.model_args` may give; which of them one has is its own. A ViT: `VIT_ARGS`."""

VITS = ("vision_transformer", "vision_transformer_hybrid", "deit")
"""Modules of timm whose models are ViTs with a position embedding for one size of images."""

Standard = Literal["none", "layer", "layer_affine", "batch"]
STANDARDS: dict[Standard, Callable[[int], nn.Module]] = {
    "none": lambda features: nn.Identity(),
    "layer": lambda features: nn.LayerNorm(features, elementwise_affine=False),
    "layer_affine": nn.LayerNorm,
    "batch": lambda features: nn.BatchNorm1d(features, affine=False),
}
"""How features may be centred and scaled: each image's by themselves, without or with a trained map behind it, or each
number by its mean and deviation over images, of the batch in training and running otherwise."""

WIDEST = 65536
"""Feature width above which it is taken for a mistake."""


@dataclass(frozen=True)
class SmallModelSpec:
    """The small CNN of every client.

    Args:
        name: a CNN or ViT of timm, or one name per client.
        features: common feature width e; a CNN of another width gets a linear map to it.
        image_size: side of the square input in pixels, independent of the ViT's.
        pretrained: start from timm's weights.
        weights: start from this safetensors file instead: a path, or the name of a file shipped in
            fedlscl/models/weights; where `name` is a list, a file for each that is to have one, under its name.
        model_args: arguments of timm's CNNs (see `CNN_ARGS`) or of its VisionTransformer (see `VIT_ARGS`); where `name`
            is a list, those of each under its name.

    Raises:
        ValueError: if a number is impossible, or `weights` does not fit the names.
        FileNotFoundError: if there is no such file of weights.
    """

    name: str | list[str] = "resnet18"
    features: int = 512
    image_size: int = 224
    pretrained: bool = False
    weights: str | dict[str, str] | None = None
    model_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 1 <= self.features <= WIDEST:
            raise ValueError(f"cnn.features is {self.features}, must be 1 to {WIDEST}")
        check_image_size("cnn", self.image_size)
        files = self.weights.values() if isinstance(self.weights, dict) else [self.weights]
        if isinstance(self.name, str) and isinstance(self.weights, dict):
            raise ValueError(f"cnn.weights is {self.weights}, must be one file, since cnn.name is one name")
        several = not isinstance(self.name, str)
        if several and (isinstance(self.weights, str) or not {*self.name}.issuperset(self.weights or ())):
            raise ValueError(
                f"cnn.weights is {self.weights}; with a list of names it must hold the file of each under its name, "
                f"such as {{{self.name[0]}: FILE}}"
            )
        for file in files:
            if file is not None:
                find_weights("cnn", file)

    @cached_property
    def weights_sha256(self) -> str | None:
        """What tells the content of the files of weights apart; None where there is none."""
        return weights_sha256("cnn", self.weights)

    def weights_of(self, name: str) -> str | None:
        """The file with the weights of the CNN of this name."""
        return self.weights.get(name) if isinstance(self.weights, dict) else self.weights

    def name_of(self, client: int) -> str:
        """The CNN of a client."""
        return self.name if isinstance(self.name, str) else self.name[client]

    def args_of(self, name: str) -> dict[str, Any]:
        """The further arguments of the CNN of this name."""
        return self.model_args if isinstance(self.name, str) else self.model_args.get(name, {})

    def check(self, clients: int) -> None:
        """Raise ValueError if there is not one name, or one per client, or `model_args` does not fit the names."""
        if isinstance(self.name, str):
            return
        if len(self.name) != clients:
            raise ValueError(
                f"cnn.name lists {len(self.name)} models for {clients} clients; list one each, or give one name"
            )
        if wrong := {k: v for k, v in self.model_args.items() if k not in self.name or not isinstance(v, dict)}:
            raise ValueError(
                f"cnn.model_args is {wrong}; with a list of names it must hold the arguments of each under its name, "
                f"such as {{{self.name[0]}: {{...}}}}"
            )


class SmallModel(nn.Module):
    """theta: a CNN or ViT that maps an image to a feature vector.

    Args:
        spec: width of the features, size of the images, and how the CNN is made.
        name: a CNN or ViT of timm.
        unit_length: scale every feature vector to L2 norm 1 (Fed-LSCL, Eq. 2).
        standardise: what is done to the features before that, see `STANDARDS`.
        linear: end in a linear map even where the CNN's width is that of the features.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        spec: SmallModelSpec,
        name: str,
        unit_length: bool = True,
        standardise: Standard = "none",
        linear: bool = False,
    ) -> None:
        # They take seconds, which only building a model is worth
        from timm.data.config import resolve_model_data_config
        from timm.models import is_model_in_modules

        super().__init__()
        self.unit_length = unit_length
        self.image_size = spec.image_size
        is_vit, args, weights = is_model_in_modules(name, VITS), spec.args_of(name), spec.weights_of(name)
        check_args("cnn", args, VIT_ARGS if is_vit else CNN_ARGS)
        args = {"img_size": spec.image_size, **args} if is_vit else args
        self.backbone = create("cnn", name, spec.pretrained and weights is None, args)
        if weights is not None:
            load_weights("cnn", self.backbone, weights)
        width, self.tiny = _trial(self.backbone, name, spec.image_size)
        check_patches("cnn", name, self.backbone, spec.image_size)
        keeps = width == spec.features and not linear
        self.project = nn.Identity() if keeps else nn.Linear(width, spec.features)
        self.standardise = STANDARDS[standardise](spec.features)
        statistics = resolve_model_data_config(self.backbone)
        self.register_buffer("mean", torch.tensor(statistics["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(statistics["std"]).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Features E (B, e) in float32, from images (B, 3, H, W) in uint8 or as floats in 0..1."""
        x = (resize(images, self.image_size) - self.mean) / self.std
        if x.is_cuda:  # on a CPU it was measured to be slower
            x = x.contiguous(memory_format=torch.channels_last)
        # oneDNN's bf16 gradient of a convolution whose stride is beyond its image holds memory that nobody has written
        in_float32 = self.tiny and x.device.type == "cpu"
        with torch.autocast("cpu", enabled=False) if in_float32 else nullcontext():
            features: Tensor = self.standardise(self.project(self.backbone(x)).float())
        return F.normalize(features, dim=1) if self.unit_length else features


def _trial(model: nn.Module, name: str, image_size: int) -> tuple[int, bool]:
    """The width of the features, and whether the stride of any convolution is beyond the image that it sees."""
    beyond = False

    def look(conv: nn.Conv2d, inputs: tuple[Tensor]) -> None:
        nonlocal beyond
        beyond |= any(size < stride for size, stride in zip(inputs[0].shape[-2:], conv.stride, strict=True))

    # timm's num_features is not the output width of models with a head of their own (MobileNetV3), so look
    hooks = [module.register_forward_pre_hook(look) for module in model.modules() if isinstance(module, nn.Conv2d)]
    try:
        model.eval()
        with torch.no_grad():
            output = model(torch.zeros(1, 3, image_size, image_size))
    except Exception as error:  # whatever an odd combination of arguments leads to
        raise ValueError(
            f"cnn.image_size: '{name}' cannot take images of {image_size} px, or not with these cnn.model_args "
            f"({reason(error)})"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(output, Tensor) or output.ndim != 2:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"cnn.name: '{name}' gives an output of shape {shape}, not one vector per image")
    return int(output.shape[1]), beyond
