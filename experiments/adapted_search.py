"""Is there anything to gain by training beside a head in closed form? Tried on images held out of training.

    python experiments/adapted_search.py experiments/pacs.yaml --root FOLDER --weights FILE.safetensors

Where there is nothing to gain with the images of all tasks at hand at once there is nothing to gain in a run, which
forgets, so that is what is tried, with the settings' own split, backbone and CNN and the head of `fed_discriminants`:

* *residual*: logits = s / T + H z, with s the scores of the head in closed form, each training image left out of the
  sums behind its own, T the temperature with the least cross-entropy of these, H a linear head that starts at 0, and z
  the class token: frozen, adapted by one LoRA for all images, or by one for each that a CNN generates. Each client
  trains alone, on the cross-entropy among its classes, adjusted by how often each is there (Menon et al., 2021) or not.
* *prior*: s / T plus the log of how often each class is among the client's images, times a weight; nothing is trained.
* *first task*: LoRA in all blocks from `--block` on, trained with a linear head on all clients' images of the first
  task; then the head in closed form on the adapted features of all tasks.

Printed are means over clients and seeds after so many epochs: the final average in % under `seen` and `task`, of the
client's own held-out images, which come as often of each class as its training images, and of those of all clients,
each class counted alike, as test images come. See experiments/results/mechanism.md.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from closed_form_search import Part, Search
from torch import Tensor, nn

from fedlscl import FrozenViT
from fedlscl.losses import masked_cross_entropy
from fedlscl.methods.fed_discriminants import BLOCKS, CHOICES, Discriminants
from fedlscl.methods.statistics.client import rounded
from fedlscl.methods.statistics.heads import Sums, added
from fedlscl.models.adapters import LoRA, LowRank, ParameterGenerator
from fedlscl.models.cnn import SmallModel, SmallModelSpec

Kind = Literal["frozen", "one for all", "one for each"]
EPOCHS = (1, 2, 3, 5, 10)
RANK, BATCH = 4, 16


class Scores(NamedTuple):
    """Accuracies in %, of the client's own held-out images and of all, each class alike."""

    seen: float
    task: float
    seen_alike: float
    task_alike: float


class Residual(nn.Module):
    """H on the class token, adapted or not."""

    vit: FrozenViT
    constant: Tensor

    def __init__(self, kind: Kind, vit: FrozenViT, block: int, cnn: SmallModel, features: int, classes: int) -> None:
        super().__init__()
        self.__dict__["vit"] = vit
        self.kind, self.block = kind, block
        self.head = nn.Linear(vit.width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if kind != "frozen":
            self.generator = ParameterGenerator(features, vit.width, RANK)
            self.register_buffer("constant", F.one_hot(torch.zeros((), dtype=torch.int64), features).float())
        if kind == "one for each":
            self.cnn = cnn

    def forward(self, tokens: Tensor, pixels: Tensor) -> Tensor:
        """Logits (B, K) from tokens (B, T, d) and pixels (B, 3, H, W)."""
        pairs = []
        if self.kind != "frozen":
            e = self.cnn(pixels) if self.kind == "one for each" else self.constant.expand(len(tokens), -1)
            pairs.append(LowRank(self.block, self.generator.split(self.generator(e))))
        logits: Tensor = self.head(self.vit.upper(tokens, self.block, pairs))
        return logits


class Adapted(Search):
    """Images, features and tokens, and what is trained on them."""

    def __init__(self, setting: dict[str, Any], args: argparse.Namespace) -> None:
        super().__init__(setting, args)
        self.setting, self.args = setting, args
        self.vit = FrozenViT(**{**setting["backbone"], **({"weights": args.weights} if args.weights else {})})
        parts = torch.split(self.pixels, 64)
        with torch.no_grad():
            self.tokens = torch.cat([self.vit.lower(self.vit.prepare(part), args.block).half() for part in parts])

    def held_out(self, clients: list[Part]) -> list[Tensor]:
        """The held-out images of all clients by class."""
        everything = torch.cat([at for client in clients for at, _ in client.tests])
        return [everything[self.labels[everything] == label] for label in range(self.classes)]

    def accuracy(self, client: Part, held_out: list[Tensor], logits: Callable[[Tensor], Tensor]) -> Scores:
        """Of logits (n, K) of the images at some positions."""

        def right(at: Tensor, among: Tensor) -> float:
            hits = logits(at).masked_fill(~among, -torch.inf).argmax(dim=1) == self.labels[at]
            return 100 * float(hits.double().mean())

        found: dict[str, list[float]] = defaultdict(list)
        for at, classes in client.tests:
            for mask, among in (("seen", client.seen), ("task", classes)):
                found[mask].append(right(at, among))
                of_classes = [held_out[int(label)] for label in classes.nonzero()]
                found[f"{mask}_alike"].append(float(np.mean([right(at, among) for at in of_classes if len(at)])))
        return Scores(**{mask: float(np.mean(values)) for mask, values in found.items()})

    def chosen_by(self, clients: list[Part], x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each client the scores of all images, for tests, and with its training images left out."""
        head = Discriminants()
        total: Sums = added(self.sums(head, x, client.train) for client in clients)
        for client in clients:
            labels, vectors = self.labels[client.train], x[client.train]
            choice = CHOICES[int(head.hits(total, vectors, labels, client.seen).argmax())]
            solution = head.solve({0: total}, choice)
            weights = torch.tensor(head.weights(choice), dtype=torch.float64)
            left_out = [
                one.left_out(part, labels)[choice.unit]
                for one, part in zip(
                    head.discriminants(total, choice.shrinkage), vectors.chunk(head.groups, dim=1), strict=True
                )
            ]
            scores = torch.einsum("g,gnk->nk", weights, torch.stack(left_out))
            temperature = min(
                np.geomspace(0.01, 300, 60),
                key=lambda t: float(masked_cross_entropy(scores / t, labels, client.seen)),
            )
            test = x @ solution.weight.T + solution.bias
            train = test.clone()
            train[client.train] = scores
            yield (test / temperature).float(), (train / temperature).float()

    def residual(self, kind: Kind, rate: float, adjusted: bool) -> dict[int, list[Scores]]:
        """By number of epochs, one for each client and seed."""
        found: dict[int, list[Scores]] = defaultdict(list)
        for number, clients in enumerate(self.seeds):
            held_out = self.held_out(clients)
            for index, (client, (test, train)) in enumerate(
                zip(clients, self.chosen_by(clients, self.plain.flatten(1)), strict=True)
            ):
                torch.manual_seed(1000 * number + index)
                found[0].append(self.accuracy(client, held_out, lambda at: test[at]))  # noqa: B023 (used at once)
                for epoch, model in self.fitted(kind, rate, adjusted, client, train):
                    found[epoch].append(
                        self.accuracy(client, held_out, lambda at: test[at] + self.of(model, at))  # noqa: B023
                    )
        return found

    def prior(self, weight: float) -> list[Scores]:
        """One for each client and seed; a class counts half an image more."""
        found = []
        for clients in self.seeds:
            held_out, scores = self.held_out(clients), self.chosen_by(clients, self.plain.flatten(1))
            for client, (test, _) in zip(clients, scores, strict=True):
                often = torch.bincount(self.labels[client.train], minlength=self.classes) + 0.5
                added = weight * (often / len(client.train)).log()
                found.append(self.accuracy(client, held_out, lambda at: test[at] + added))  # noqa: B023 (used at once)
        return found

    def of(self, model: Residual, at: Tensor) -> Tensor:
        """Its logits."""
        logits: Tensor = model(self.tokens[at].float(), self.pixels[at])
        return logits

    def fitted(
        self, kind: Kind, rate: float, adjusted: bool, client: Part, scores: Tensor
    ) -> Iterator[tuple[int, Residual]]:
        """A client's residual after each of some epochs."""
        spec = SmallModelSpec(**self.setting["cnn"])
        cnn = SmallModel(spec, spec.name_of(0))
        model = Residual(kind, self.vit, self.args.block, cnn, spec.features, self.classes)
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        often = torch.bincount(self.labels[client.train], minlength=self.classes).float()
        prior = (often / often.sum()).log() if adjusted else torch.zeros(self.classes)
        for epoch in range(1, self.args.epochs + 1):
            model.train()
            for at in torch.split(client.train[torch.randperm(len(client.train))], BATCH):
                logits = scores[at] + self.of(model, at) + prior
                optimizer.zero_grad()
                masked_cross_entropy(logits, self.labels[at], client.seen).backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            if epoch in EPOCHS:
                with torch.no_grad():
                    yield epoch, model.eval()

    def first_task(self, rate: float) -> dict[int, list[Scores]]:
        """By number of epochs, one for each client and seed."""
        found: dict[int, list[Scores]] = defaultdict(list)
        d, blocks = self.vit.width, range(self.args.block, self.vit.depth)
        for number, clients in enumerate(self.seeds):
            torch.manual_seed(number)
            found[0] += self.closed_form(clients, self.plain)
            at = torch.cat([client.first for client in clients])
            present = torch.bincount(self.labels[at], minlength=self.classes) > 0
            pairs = [
                LoRA(nn.Parameter(torch.randn(RANK, d) / d**0.5), nn.Parameter(torch.zeros(3 * d, RANK)))
                for _ in blocks
            ]
            lora = [LowRank(block, pair) for block, pair in zip(blocks, pairs, strict=True)]
            head = nn.Linear(d, self.classes)
            groups: list[dict[str, Any]] = [
                {"params": [one for pair in pairs for one in pair]},
                {"params": head.parameters(), "lr": 3 * rate},
            ]
            optimizer = torch.optim.Adam(groups, lr=rate)
            for epoch in range(1, self.args.epochs + 1):
                for rows in torch.split(at[torch.randperm(len(at))], BATCH):
                    logits = head(self.vit.upper(self.tokens[rows].float(), self.args.block, lora))
                    optimizer.zero_grad()
                    masked_cross_entropy(logits, self.labels[rows], present).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                if epoch in EPOCHS:
                    found[epoch] += self.closed_form(clients, rounded(self.summaries(lora)))
        return found

    def closed_form(self, clients: list[Part], x: Tensor) -> list[Scores]:
        """The head in closed form on features (N, 2 BLOCKS, d), of each client."""
        held_out, logits = self.held_out(clients), self.chosen_by(clients, x.flatten(1))
        return [
            self.accuracy(client, held_out, lambda at: test[at])  # noqa: B023 (used at once)
            for client, (test, _) in zip(clients, logits, strict=True)
        ]

    @torch.no_grad()
    def summaries(self, lora: Sequence[LowRank]) -> Tensor:
        """What `FrozenViT.summaries` gives (N, 2 BLOCKS, d), of the adapted ViT."""
        merged, block = self.vit.merged(lora), self.args.block
        parts = torch.split(self.tokens, 64)
        return torch.cat([self.vit.summarised(part.float(), block, BLOCKS, merged) for part in parts])


def show(title: str, found: dict[int, list[Scores]]) -> None:
    """A line for each number of epochs."""
    for epoch, scores in sorted(found.items()):
        means = np.mean(scores, axis=0)
        print(
            f"{title:70} {epoch:3}  ",
            *(f"{name} {mean:.1f} " for name, mean in zip(Scores._fields, means, strict=True)),
        )


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", help="a setting's YAML")
    parser.add_argument("--root", help="folder of images")
    parser.add_argument("--weights", help="of the ViT")
    parser.add_argument("--try", dest="tried", choices=("residual", "first"), default="residual")
    parser.add_argument("--block", type=int, default=11, help="the adapted block; with `first` the first of them")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rate", type=float, default=3e-4, help="of Adam")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1999, 2024])
    args = parser.parse_args(namespace=argparse.Namespace(features=None))
    torch.set_num_threads(1)
    search = Adapted(yaml.safe_load(Path(args.setting).read_text()), args)
    if args.tried == "first":
        show(f"first task, LoRA from block {args.block} on, rate {args.rate:g}", search.first_task(args.rate))
        return
    for weight in (0.25, 0.5, 1.0):
        show(f"prior, weight {weight:g}", {0: search.prior(weight)})
    for kind in get_args(Kind):
        for adjusted in (False, True):
            title = f"residual, class token {'frozen' if kind == 'frozen' else f'adapted, {kind}'}"
            show(title + ", adjusted" * adjusted, search.residual(kind, args.rate, adjusted))


if __name__ == "__main__":
    main()
