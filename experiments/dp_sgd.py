"""What DP-SGD would give: FedViT with a private head, beside the heads in closed form with noise.

    python experiments/dp_sgd.py SETTING.yaml --epsilons 1 2 4 8 inf --seeds 42 1999 2024 [--rounds 1] [--epochs 10]
        [--batch_size 0] [--learning_rate 0.1] [-- fields of `fedlscl fit`]

The head is linear, on frozen features of length 1, so that the gradient of an image is an outer product, p [h; 1]^T
with p = softmax(z) - y, of length |p| sqrt(2): no library is needed to clip it. A step (Abadi et al., 2016) takes each
image of the task with probability q, clips each gradient to length 1, adds noise N(0, z^2) to their sum, and hands the
sum, divided by the expected number of images, to Adam. Uploads are averaged as FedAvg does; each is private by itself.

For measuring, not for use: nothing here keeps training metrics from travelling, nor counts repeated rounds, and batches
and noise come from the run's seed. `--batch_size 0` takes all images in each step.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from privacy import MASKS, ended
from torch import Tensor

from fedlscl.batches import Batch, Output
from fedlscl.methods.frozen_vit import FrozenViTClient
from fedlscl.models.cache import FrozenCache
from fedlscl.privacy import epsilon_of, noise_multiplier

ORDERS = np.arange(2, 257)


def renyi(rate: float, multiplier: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The Renyi divergence of one step at each of `ORDERS` (Mironov, Talwar and Zhang, 2019, section 3.3).

    log of sum over k of C(a, k) (1 - q)^(a - k) q^k exp((k^2 - k) / (2 z^2)), over a - 1, for whole a.
    """
    found = np.empty(len(ORDERS))
    for place, order in enumerate(ORDERS.tolist()):
        k = np.arange(order + 1)
        chosen = math.lgamma(order + 1) - np.array(
            [math.lgamma(n + 1) + math.lgamma(order - n + 1) for n in k.tolist()]
        )
        logs = chosen + k * math.log(rate) + (order - k) * math.log1p(-rate) + (k * k - k) / (2 * multiplier**2)
        found[place] = np.logaddexp.reduce(logs) / (order - 1)
    return found


def epsilon_of_steps(rate: float, multiplier: float, steps: int, delta: float) -> float:
    """An epsilon of so many steps, each with every image at some rate; at the rate 1 the least.

    From Renyi divergence by Canonne, Kamath and Steinke (2020, Proposition 12).
    """
    if rate == 1:
        return epsilon_of(multiplier / math.sqrt(steps), delta)
    bounds = steps * renyi(rate, multiplier) + np.log1p(-1 / ORDERS) - (math.log(delta) + np.log(ORDERS)) / (ORDERS - 1)
    return max(0.0, float(bounds.min()))


def multiplier_for(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """The least noise multiplier with which so many steps are private, to a part of 1e-4."""
    if rate == 1:
        return noise_multiplier(epsilon, delta) * math.sqrt(steps)
    low, high = 0.2, 0.4
    while epsilon_of_steps(rate, high, steps, delta) > epsilon:
        low, high = high, 2 * high
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if epsilon_of_steps(rate, middle, steps, delta) <= epsilon else (middle, high)
    return high


def clipped_gradients(logits: Tensor, labels: Tensor, features: Tensor) -> Tensor:
    """The sum (K, d + 1) of the images' gradients in weights and bias, each scaled to a length of 1 at most.

    Args:
        logits: (B, K), -inf for classes that do not compete.
        labels: (B,).
        features: (B, d).
    """
    errors = logits.softmax(dim=1) - F.one_hot(labels, logits.shape[1])
    inputs = F.pad(features, (0, 1), value=1.0)
    lengths = errors.norm(dim=1, keepdim=True) * inputs.norm(dim=1, keepdim=True)
    total: Tensor = (errors / lengths.clamp(min=1)).T @ inputs
    return total


class PrivateHead(FrozenViTClient):
    """FedViT whose steps are those of DP-SGD.

    Args:
        epsilon: of each image, over all its steps; 0 for no noise (gradients are clipped still).
        delta: likewise.
        rounds: of each task.
        batch_size: expected number of images in a step; 0 for all.
        **kwargs: settings of FedViT.
    """

    uncapturable = "it draws from a generator of its own"

    def __init__(
        self, epsilon: float = 0.0, delta: float = 1e-5, rounds: int = 1, batch_size: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(share="head", **kwargs)
        self.epsilon, self.delta, self.rounds, self.expected = epsilon, delta, rounds, batch_size

    def forward(self, images: Tensor, frozen: Mapping[str, Tensor]) -> Output:
        """The head on features of length 1."""
        features = F.normalize(frozen["features"].float(), dim=1)
        return Output(self.head(features), features)

    def draw_plan(self) -> None:
        """Each image in each step at the same rate (Poisson sampling), as the accountant assumes."""
        count = len(self.current)
        self.rate = min(1.0, (self.expected or count) / count)
        steps = self.epochs * math.ceil(1 / self.rate)
        self.noise = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=self.rng("noise"))))
        self.multiplier = 0.0
        if self.epsilon:
            self.multiplier = multiplier_for(self.epsilon, self.delta, self.rate, steps * self.rounds)
        rng, start = self.rng("order"), len(self.memory.buffer)
        drawn = [(torch.rand(count, generator=rng) < self.rate).nonzero().flatten() for _ in range(steps)]
        self.plan = [("collaborate", start + positions) for positions in drawn]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Clip, add noise, step."""
        with torch.no_grad():
            output, labels = self.output(batch.images), batch.images.labels
            logits = output.logits.masked_fill(~self.competing_mask, -torch.inf)
            total = clipped_gradients(logits, labels, output.representation)
            total += self.multiplier * torch.randn(total.shape, generator=self.noise)
            mean = total / (self.rate * len(self.current))
        optimizer: Any = self.optimizers()
        self.head.weight.grad, self.head.bias.grad = mean[:, :-1].contiguous(), mean[:, -1].contiguous()
        optimizer.step()


def main() -> None:
    """Run, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", type=Path)
    parser.add_argument("--epsilons", nargs="+", type=float, default=[1, 2, 4, 8, math.inf])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 1999, 2024])
    for name, kind, value in (
        ("rounds", int, 1),
        ("epochs", int, 10),
        ("batch_size", int, 0),
        ("learning_rate", float, 0.1),
    ):
        parser.add_argument(f"--{name}", type=kind, default=value)
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    given, fields = parser.parse_args(words[:end]), words[end + 1 :]
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for seed in given.seeds:
        features: FrozenCache | None = None
        for epsilon in given.epsilons:
            arguments: dict[str, Any] = {
                name: getattr(given, name) for name in ("rounds", "epochs", "batch_size", "learning_rate")
            }
            arguments |= {"epsilon": 0.0 if math.isinf(epsilon) else epsilon, "train_mask": "task"}
            arguments["continual"] = {"class_path": "NoReplay"}
            method = {
                "method": "fedvit_dp",
                "model": {"class_path": "dp_sgd.PrivateHead", "init_args": arguments},
                "server": {"class_path": "FedAvg"},
            }
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "method.yaml"
                path.write_text(yaml.safe_dump(method))
                given_words = [
                    "--config",
                    str(given.setting),
                    "--config",
                    str(path),
                    "--federation.rounds",
                    str(given.rounds),
                ]
                given_words += ["--seed_everything", str(seed), *fields, "--run_dir", folder]
                result, features = ended(given_words, features)
            row = {mask: round(result.mean(mask), 2) for mask in MASKS}
            print(json.dumps({"epsilon": epsilon, "seed": seed, **row}), flush=True)
            for mask in MASKS:
                found[mask][epsilon].append(row[mask])
    print(f"| mask | {' | '.join(f'{epsilon:g}' for epsilon in given.epsilons)} |")
    print("| --- " * (1 + len(given.epsilons)) + "|")
    for mask, by_epsilon in found.items():
        cells = [
            f"{statistics.mean(v):.1f}" + (f" ± {statistics.stdev(v):.1f}" if len(v) > 1 else "")
            for v in by_epsilon.values()
        ]
        print(f"| {mask} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
