"""A small model's features beside those of the ViT in closed form, tried on images held out of training.

    python experiments/both_search.py experiments/pacs.yaml -- --data.split.local_test holdout30 \\
        --data.source.root FOLDER --backbone.weights FILE.safetensors
    python experiments/both_search.py experiments/inked_digits.yaml -- --data.source.source HeldOut \\
        --data.source.source.source Digits

The search behind `fed_discriminants_both`, see experiments/results/mechanism.md. Words behind -- go to the setting, and
must hold images out: those that a client is tested on are taken for that. For each seed the small model is left out,
as it is drawn, or averaged over the clients in the first task as the method does; sums go on from task to task, and
each client sees its current images alone. Printed is the final average in % under `seen`, `task` and `federation`, as
mean and by seed, with the small model's scores at fixed weights, at the weight that each client chooses (the method),
at the one that all choose together, and *stacked*: with weights, none below 0, of the least cross-entropy of each
client's images, left out of the sums, among the classes that it has seen, the mean over its tasks.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from fedlscl.data.source import Part as Side
from fedlscl.evaluation import masked_correct
from fedlscl.losses import masked_cross_entropy
from fedlscl.methods.fed_discriminants import BLOCKS, SMALL_WEIGHTS, Choice, Discriminants
from fedlscl.methods.fed_discriminants_both import SCALE, BothDiscriminantsClient
from fedlscl.methods.statistics.client import rounded
from fedlscl.methods.statistics.heads import Sums, added
from fedlscl.models.cnn import SmallModel
from fedlscl.run.configuration import Configuration

Kind = Literal["none", "as drawn", "averaged"]
MASKS = ("seen", "task", "federation")
PENALTY = 1e-3  # of the squares of stacked weights, where scores are 1 in the mean


class Part(NamedTuple):
    """One client: positions of images among all whose features are known, by task."""

    train: list[Tensor]
    test: list[Tensor]
    classes: list[Tensor]  # (K,) of each task

    def seen(self, tasks: int) -> Tensor:
        """(K,) the classes of the first tasks."""
        return torch.stack(self.classes[:tasks]).any(dim=0)


class Search:
    """One seed: its images, their features, and what is tried on them."""

    def __init__(self, setting: str, seed: int, words: list[str]) -> None:
        method = Path(__file__).parent / "methods" / "fed_discriminants_both.yaml"
        described = [f"--config={setting}", f"--config={method}", f"--seed_everything={seed}", *words]
        self.experiment, self.seed = Configuration(described).build(), seed
        self.experiment.load()
        data, client = self.experiment.data, self.experiment.client
        assert isinstance(client, BothDiscriminantsClient)
        self.client, self.classes, split = client, data.num_classes, data.split
        place: dict[tuple[Side, int], int] = {}

        def positions(part: Side, indices: Any) -> Tensor:
            return torch.tensor([place.setdefault((part, int(n)), len(place)) for n in indices], dtype=torch.int64)

        def mask(labels: Any) -> Tensor:
            return torch.zeros(data.num_classes, dtype=torch.bool).index_fill(0, torch.tensor([*labels]), value=True)

        self.parts = [
            Part(
                [positions("train", task.train) for task in one.tasks],
                [positions(split.evaluate_on, task.test) for task in one.tasks],
                [mask(task.classes) for task in one.tasks],
            )
            for one in split.clients
        ]
        self.federation = mask({label for labels in split.federation for label in labels})
        images = [data.batch(part, np.array([n])) for part, n in place]
        self.pixels, self.labels = (torch.cat(of) for of in zip(*images, strict=True))
        with torch.no_grad():
            summaries = [self.experiment.vit.summaries(part, BLOCKS) for part in torch.split(self.pixels, 64)]
        self.summaries = torch.cat(summaries).flatten(1)

    def small(self, kind: Kind) -> Tensor:
        """(N, e) the small model's features."""
        spec, rng = self.experiment.cnn, torch.Generator().manual_seed(self.seed)
        torch.manual_seed(self.seed)
        model = SmallModel(spec, spec.name_of(0))
        copies = [copy.deepcopy(model) for _ in self.parts]
        heads = [nn.Linear(spec.features, self.classes) for _ in self.parts]
        for _ in range(self.experiment.schedule.rounds - 1 if kind == "averaged" else 0):
            for one, head, part in zip(copies, heads, self.parts, strict=True):
                self.fit(one.train(), head, part, rng)
            sizes = torch.tensor([len(part.train[0]) for part in self.parts])
            states = [one.state_dict() for one in copies]
            mean = {
                name: sum(n * state[name] for n, state in zip(sizes / sizes.sum(), states, strict=True))
                for name in states[0]
            }
            for one in (model, *copies):
                one.load_state_dict(mean)
        model.eval()
        with torch.no_grad():
            return torch.cat([model(part) for part in torch.split(self.pixels, 256)])

    def fit(self, model: SmallModel, head: nn.Linear, part: Part, rng: torch.Generator) -> None:
        """A client's round of training."""
        optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=self.client.learning_rate)
        for _ in range(self.client.epochs):
            order = part.train[0][torch.randperm(len(part.train[0]), generator=rng)]
            for at in torch.split(order, self.client.training_batch_size):
                loss = masked_cross_entropy(head(SCALE * model(self.pixels[at])), self.labels[at], part.classes[0])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()

    def tried(self, kind: Kind) -> dict[str, dict[str, float]]:
        """Final averages in % by mask, of each way to weigh the scores."""
        small = None if kind == "none" else self.small(kind)
        x = rounded(self.summaries if small is None else torch.cat([self.summaries, small], dim=1))
        head = Discriminants(2 * min(BLOCKS, self.experiment.vit.depth), 0 if small is None else small.shape[1])
        sums: Sums = {}
        hits = torch.zeros(len(self.parts), len(head.choices), dtype=torch.int64)
        weights = [torch.zeros((), dtype=torch.float64)] * len(self.parts)
        for task in range(len(self.parts[0].train)):
            current = [part.train[task] for part in self.parts]
            parts = (head.sums(x[at], self.labels[at], at, self.classes) for at in current)
            sums = added([sums, *parts])
            for index, (at, part) in enumerate(zip(current, self.parts, strict=True)):
                seen = part.seen(task + 1)
                hits[index] += head.hits(sums, x[at], self.labels[at], seen)
                scores = self.scores(head, sums, x[at], self.labels[at])
                weights[index] = weights[index] + len(at) * stacked(scores, self.labels[at], seen)
        names = ["weight chosen by each", "weight chosen by all"]
        chosen = [[head.choices[int(row.argmax())] for row in of] for of in (hits, hits.sum(0).expand_as(hits))]
        if small is not None:
            names += [f"weight {weight:g}" for weight in SMALL_WEIGHTS[1:]]
            chosen += [[one._replace(small=weight) for one in chosen[0]] for weight in SMALL_WEIGHTS[1:]]
        found = {name: self.average(head, sums, x, of) for name, of in zip(names, chosen, strict=True)}
        return {**found, "stacked": self.average(head, sums, x, weights)}

    def scores(self, head: Discriminants, sums: Sums, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """(S, n, K) of every vector, shrinkage and length of weights; left out of the sums if labels are given."""
        found: list[Tensor] = []
        for shrinkage in (0.1, 0.3):
            for one, vectors in zip(head.discriminants(sums, shrinkage), head.parts(x), strict=True):
                if labels is not None:
                    found += one.left_out(vectors, labels)
                else:
                    found += [vectors @ weight.T + bias for weight, bias in (one.head(False), one.head(True))]
        return torch.stack(found)

    def average(
        self, head: Discriminants, sums: Sums, x: Tensor, of: Sequence[Choice] | Sequence[Tensor]
    ) -> dict[str, float]:
        """The final average in % under each mask, with a choice or stacked weights for each client."""
        found = defaultdict[str, list[float]](list)
        for part, one in zip(self.parts, of, strict=True):
            for at, classes in zip(part.test, part.classes, strict=True):
                if isinstance(one, Choice):
                    solution = head.solve({0: sums}, one)
                    logits = x[at] @ solution.weight.T + solution.bias
                else:
                    logits = torch.einsum("s,snk->nk", one, self.scores(head, sums, x[at]))
                masks = classes.expand(len(at), -1), part.seen(len(part.test)), self.federation
                for mask, right in masked_correct(logits, self.labels[at], *masks).items():
                    found[mask].append(100 * float(right.double().mean()))
        return {mask: float(np.nanmean(values)) for mask, values in found.items()}


def stacked(scores: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """(S,) weights, none below 0, of scores (S, n, K), with the least cross-entropy and a penalty."""
    sizes = scores[:, :, classes].abs().mean(dim=(1, 2))
    scaled = scores / sizes[:, None, None]

    def objective(values: Any) -> tuple[float, Any]:
        weights = torch.tensor(values, requires_grad=True)
        loss = masked_cross_entropy(torch.einsum("s,snk->nk", weights, scaled), labels, classes)
        loss = loss + PENALTY * weights.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        assert weights.grad is not None
        return float(loss.detach()), weights.grad.numpy()

    start = np.full(len(scores), 1 / len(scores))
    found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(scores))
    return torch.from_numpy(found.x) / sizes


def main() -> None:
    """See above."""
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", help="a setting's YAML")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1999, 2024])
    args = parser.parse_args(words[:at])
    searches = [Search(args.setting, seed, words[at + 1 :]) for seed in args.seeds]
    for kind in get_args(Kind):
        found = [search.tried(kind) for search in searches]
        for name in found[0]:
            values = {mask: [one[name][mask] for one in found] for mask in MASKS}
            told = (f"{mask} {np.mean(of):.1f} ({', '.join(f'{n:.1f}' for n in of)})" for mask, of in values.items())
            print(f"{kind:10} {name:22}", *told, flush=True)


if __name__ == "__main__":
    main()
