"""CUB-200-2011, 11,788 photographs of 200 kinds of birds, with its official split."""

from __future__ import annotations

from pathlib import Path

from fedlscl.data.cache import Files, load_images
from fedlscl.data.folders import ImageArchive
from fedlscl.data.source import Dataset
from fedlscl.data.temporary import sweep

INNER = "CUB_200_2011"
"""The folder in the archive."""


class CUB200(ImageArchive):
    """CUB-200-2011; classes are called as its folders, such as ``001.Black_footed_Albatross``.

    ``images.txt`` says which images there are and ``train_test_split.txt`` which of them are for training.

    Args:
        root: the unpacked ``CUB_200_2011`` folder, or ``CUB_200_2011.tgz``, then unpacked into the cache.
    """

    inner = INNER

    def load(self, cache_dir: Path) -> Dataset:
        """Return CUB-200-2011, decoded or from the cache.

        Raises:
            FileNotFoundError: root, one of the two lists or an image is missing.
            ValueError: a list is not what it should be, there are not the expected classes, one has no image in one of
                the parts, or images cannot be read.
        """
        sweep(cache_dir)
        root = self.folder(cache_dir)
        images, training = _listed(root / "images.txt"), _listed(root / "train_test_split.txt")
        if images.keys() != training.keys():
            number = min(images.keys() ^ training.keys())
            raise ValueError(f"{root}: image {number} is in one of images.txt and train_test_split.txt alone")
        for number, path in images.items():
            folder, _, name = path.partition("/")
            if not name or "/" in name or {folder, name} & {"", ".", ".."}:
                raise ValueError(f"{root / 'images.txt'}: '{path}' of image {number} is no CLASS/FILE")
            if (part := training[number]) not in ("0", "1"):
                raise ValueError(
                    f"{root / 'train_test_split.txt'}: image {number} has '{part}', must be 1 (training) or 0"
                )
        classes = sorted({path.partition("/")[0] for path in images.values()})
        if len(classes) != self.expected_classes:
            raise ValueError(f"{root / 'images.txt'} has {len(classes)} classes, expected {self.expected_classes}")
        parts: dict[str, dict[str, list[Path]]] = {
            "1": {name: [] for name in classes},
            "0": {name: [] for name in classes},
        }
        for number, path in sorted(images.items(), key=lambda item: item[1]):
            folder, _, name = path.partition("/")
            parts[training[number]][folder].append(root / "images" / folder / name)
        for part, of in parts.items():
            if lacking := [name for name, paths in of.items() if not paths]:
                what = "training" if part == "1" else "test"
                raise ValueError(f"{root}: class {lacking[0]} has no {what} image")
        train, test = load_images(
            "cub200", self.decoder, root, (Files("train", parts["1"]), Files("test", parts["0"])), cache_dir
        )
        return Dataset("cub-200-2011", train, test, tuple(classes))


def _listed(path: Path) -> dict[int, str]:
    """What a list says of each image, by its number: lines of a number and a word."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; root must be the folder {INNER} or {INNER}.tgz")
    found: dict[int, str] = {}
    for line, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        number, _, word = text.strip().partition(" ")
        if not (number.isascii() and number.isdecimal() and word) or int(number) in found:
            raise ValueError(f"{path}, line {line}: '{text}' is no number of its own and a word")
        found[int(number)] = word
    return found
