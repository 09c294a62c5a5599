"""A federation that takes a second a round: six classes of 72 image files, two clients, two tasks, one round each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

CLASSES = 6
TRAIN, TEST = 8, 4  # images of a class
SIDE = 40  # pixels


def picture(label: int, number: int) -> Image.Image:
    """A bright square whose colour is the class's, anywhere on dark noise; another for each number."""
    rng = np.random.default_rng([label, number])
    pixels = rng.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
    colour = np.random.default_rng(label).integers(60, 256, 3)
    top, left = rng.integers(0, SIDE // 2, 2)
    pixels[top : top + SIDE // 2, left : left + SIDE // 2] = colour
    return Image.fromarray(pixels)


def write_images(root: Path) -> None:
    """Write the classes' folders below `root`, as PNG."""
    for part, first, count in (("train", 0, TRAIN), ("test", TRAIN, TEST)):
        for label in range(CLASSES):
            folder = root / part / f"class {label}"
            folder.mkdir(parents=True)
            for number in range(first, first + count):
                picture(label, number).save(folder / f"{number}.png")


def configuration(images: Path, cache: Path) -> dict[str, Any]:
    """Fed-LSCL on these images, in its default form."""
    split = {"clients": 2, "tasks": 2, "classes_per_task": 2, "private_classes": 1, "public_classes": 3}
    vit_args = {"patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
    cnn_args = {"channels": [8, 16, 16, 32], "norm_layer": "groupnorm1"}
    return {
        "setting": "mini",
        "method": "fed_lscl",
        "seed_everything": 42,
        "threads": 1,
        "data": {
            "source": {"class_path": "ImageFolder", "init_args": {"root": str(images), "size": 32}},
            "split": {**split, "min_public_images": 2},
            "cache_dir": str(cache),
        },
        "backbone": {"name": "vit_tiny_patch16_224", "image_size": 32, "model_args": vit_args},
        "cnn": {"name": "resnet18", "features": 32, "image_size": 32, "model_args": cnn_args},
        "federation": {"rounds": 1},
        "trainer": {"accelerator": "cpu"},
        "tracking": {"wandb_mode": "disabled"},
        "model": {
            "class_path": "FedLSCL",
            "init_args": {
                "epochs": 1,
                "block": 2,
                "continual": {"class_path": "Replay", "init_args": {"passes": 1}},
            },
        },
        "server": {"class_path": "ExactO2D"},
    }


def write(folder: Path) -> Path:
    """Write images and configuration into a folder, which may be there; the path of the configuration."""
    if not (folder / "images").is_dir():
        write_images(folder / "images")
    path = folder / "mini.yaml"
    path.write_text(yaml.safe_dump(configuration(folder / "images", folder / "cache"), sort_keys=False))
    return path
