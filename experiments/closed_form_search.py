"""Heads in closed form on a frozen ViT's features, compared on images held out of training: the log of our own method.

    python experiments/closed_form_search.py experiments/pacs.yaml --root FOLDER --weights FILE.safetensors

For each of the seeds it deals the setting's images as a run with `--data.split.local_test holdout30` does, and prints,
as means over the seeds, the final average in % under `seen`, `task` and `federation` of every head that
experiments/results/mechanism.md ("A method of our own") speaks of. No test image is looked at. Features are computed
once for all seeds; `--features FILE.npz` keeps them. For what is trained, see adapted_search.py and both_search.py.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor

from fedlscl import Digits, FederatedDataModule, FrozenViT, SplitSpec
from fedlscl.data.folders import ImageFolder
from fedlscl.evaluation import masked_correct
from fedlscl.methods.fed_discriminants import BLOCKS, CHOICES, Choice, Discriminants
from fedlscl.methods.statistics.client import numbers_of, rounded
from fedlscl.methods.statistics.heads import ClassMeans, ClosedFormHead, Ridge, Solution, Sums, added

WEIGHTS: dict[str, tuple[float, ...]] = {
    "last class token": (1, 0),
    "last class token, patch token by a half": (1, 1 / 2),
    "last class and patch token": (1, 1),
    "all eight, by block": (1, 1, 1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 4, 1 / 4),
    "all eight": (1,) * 8,
}
MASKS = ("seen", "task", "federation")


class Part(NamedTuple):
    """One client in one seed: positions of images among all whose features are known."""

    train: Tensor  # (n,)
    first: Tensor  # (m,) those of the first task among them
    tests: list[tuple[Tensor, Tensor]]  # of each task the images (m,), and its classes (K,) as a mask
    federation: Tensor  # (K,)

    @property
    def seen(self) -> Tensor:
        """(K,) the classes of all tasks."""
        return torch.stack([classes for _, classes in self.tests]).any(dim=0)


def module(setting: dict[str, Any], root: str | None, seed: int) -> FederatedDataModule:
    """The setting's data, a part of the training images held out."""
    source = setting["data"]["source"]
    given = {**source.get("init_args", {}), **({"root": root} if root else {})}
    split: dict[str, Any] = {**setting["data"]["split"], "local_test": "holdout30"}
    split = {name: tuple(value) if isinstance(value, list) else value for name, value in split.items()}
    kind = Digits if source["class_path"] == "Digits" else ImageFolder
    data = FederatedDataModule(kind(**given), SplitSpec(**split), seed=seed)
    data.prepare_data()
    data.setup()
    return data


def parts_of(data: FederatedDataModule, place: dict[int, int]) -> list[Part]:
    """All clients of one seed."""

    def mask(labels: Any) -> Tensor:
        found = torch.zeros(data.num_classes, dtype=torch.bool)
        found[list(labels)] = True
        return found

    def at(indices: Any) -> Tensor:
        return torch.tensor([place[int(n)] for n in indices])

    everybody = mask({label for labels in data.split.federation for label in labels})
    return [
        Part(
            at(np.concatenate([t.train for t in c.tasks])),
            at(c.tasks[0].train),
            [(at(t.test), mask(t.classes)) for t in c.tasks],
            everybody,
        )
        for c in data.split.clients
    ]


class Search:
    """The images of all seeds with their features, and what is tried on them."""

    def __init__(self, setting: dict[str, Any], args: argparse.Namespace) -> None:
        modules = [module(setting, args.root, seed) for seed in args.seeds]
        used = sorted({int(n) for d in modules for c in d.split.clients for t in c.tasks for n in [*t.train, *t.test]})
        place = {index: n for n, index in enumerate(used)}
        self.seeds = [parts_of(data, place) for data in modules]
        self.classes, indices = modules[0].num_classes, np.array(used)
        self.labels = torch.as_tensor(modules[0].dataset.train.labels[indices])
        self.pixels = pixels = modules[0].batch("train", indices)[0]
        self.numbers = numbers_of(pixels)
        if args.features and Path(args.features).exists():
            plain, flipped = (torch.from_numpy(array) for array in np.load(args.features).values())
        else:
            vit = FrozenViT(**{**setting["backbone"], **({"weights": args.weights} if args.weights else {})})
            plain, flipped = (self._features(vit, images) for images in (pixels, pixels.flip(-1)))
            if args.features:
                np.savez(args.features, plain=plain.numpy(), flipped=flipped.numpy())
        self.plain, self.flipped = rounded(plain), rounded(flipped)  # (N, 2 BLOCKS, d)

    @staticmethod
    def _features(vit: FrozenViT, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([vit.summaries(part, BLOCKS) for part in torch.split(pixels, 64)])

    def sums(self, head: ClosedFormHead, x: Tensor, at: Tensor) -> Sums:
        """Over some images."""
        return head.sums(x[at], self.labels[at], self.numbers[at], self.classes)

    def tried(self) -> Iterator[tuple[str, Callable[[list[Part]], list[Solution]], Tensor]]:
        """Name, one head for each client from all of them, and the features (N, p) that it is for."""
        last, every = self.plain[:, -2], self.plain.flatten(1)

        def shared(head: ClosedFormHead, x: Tensor) -> Callable[[list[Part]], list[Solution]]:
            return lambda clients: [head.solve({0: added(self.sums(head, x, c.train) for c in clients)})] * len(clients)

        def alone(head: ClosedFormHead, x: Tensor) -> Callable[[list[Part]], list[Solution]]:
            return lambda clients: [head.solve({0: self.sums(head, x, c.train)}) for c in clients]

        yield "fedncm", shared(ClassMeans(), last), last
        yield "local_ridge", alone(Ridge(normalise=True), last), last
        yield "fed_ridge", shared(Ridge(normalise=True), last), last
        rng = torch.Generator().manual_seed(0)
        random = rounded(
            (last @ torch.randn(last.shape[1], 1000, generator=rng).double() / last.shape[1] ** 0.5).relu()
        )
        yield "fed_ranpac", shared(Ridge(), random), random
        yield "ridge, all vectors side by side", shared(Ridge(normalise=True), every), every
        for views, x in (("", self.plain), (", mean of image and mirror image", (self.plain + self.flipped) / 2)):
            for (name, weights), g, unit in product(WEIGHTS.items(), (0.1, 0.3, 0.5), (False, True)):
                title = f"discriminants, {name}, g = {g}{', unit length' * unit}{views}"
                yield title, self._with(Choice(weights, g, unit), x), x.flatten(1)
        yield "discriminants, chosen by leaving out", self.chosen, every

    def _with(self, choice: Choice, x: Tensor) -> Callable[[list[Part]], list[Solution]]:
        head, flat = Discriminants(), rounded(x.flatten(1))
        return lambda clients: (
            [head.solve({0: added(self.sums(head, flat, c.train) for c in clients)}, choice)] * len(clients)
        )

    def chosen(self, clients: list[Part]) -> list[Solution]:
        """What `fed_discriminants` does, the choice at the end, on the images of all tasks at once."""
        head, x = Discriminants(), self.plain.flatten(1)
        total = added(self.sums(head, x, client.train) for client in clients)
        found = []
        for client in clients:
            hits = head.hits(total, x[client.train], self.labels[client.train], client.seen)
            found.append(head.solve({0: total}, CHOICES[int(hits.argmax())]))
        return found

    def scores(self, solve: Callable[[list[Part]], list[Solution]], x: Tensor) -> dict[str, float]:
        """The final average under each mask, mean over the seeds."""
        found = defaultdict[str, list[float]](list)
        for clients in self.seeds:
            heads = solve(clients)
            for mask in MASKS:
                averages = [self._average(client, head, x, mask) for client, head in zip(clients, heads, strict=True)]
                found[mask].append(float(np.mean(averages)))
        return {mask: float(np.mean(values)) for mask, values in found.items()}

    def _average(self, client: Part, head: Solution, x: Tensor, mask: str) -> float:
        tasks = []
        for at, classes in client.tests:
            logits = x[at] @ head.weight.T + head.bias
            of_task = classes.expand(len(at), -1)
            right = masked_correct(logits, self.labels[at], of_task, client.seen, client.federation)[mask]
            tasks.append(100 * float(right.double().mean()))
        return float(np.mean(tasks))


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", help="a setting's YAML")
    parser.add_argument("--root", help="folder of images")
    parser.add_argument("--weights", help="of the ViT")
    parser.add_argument("--features", help="file to keep the features in")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1999, 2024])
    args = parser.parse_args()
    search = Search(yaml.safe_load(Path(args.setting).read_text()), args)
    for name, solve, x in search.tried():
        found = search.scores(solve, x)
        print(f"{name:80}", *(f"{mask} {value:.1f}" for mask, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
