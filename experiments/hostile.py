"""A server that chooses the frozen model: how many images it can read in sums of features, beside the honest model.

    python experiments/hostile.py FOLDER --seeds 42 1999 2024 [--bins 16] [-- fields of `fedlscl fit`]

The hostile ViT is made by hand, not trained. It has one patch, as large as the image, whose embedding holds the image's
pixels p, made small, and a number m = r^T p. Its one MLP writes into each of B groups of features, b = 1..B,

    GELU(K (m - t_b) + p) - GELU(K (m - t_b)), for a large K nearly p where m > t_b, and else 0,

so that the sums of two neighbouring groups differ by the sum over the images with m between t_b and t_b+1: where a
class has one such image, by that image (bins as in Fowl et al., Robbing the Fed, ICLR 2022, here in the features of a
frozen model). Layer normalisation is made harmless by two large constants. Direction r and thresholds t come from
images that no client has. Runs are of `fed_ridge` on the digits, one round a task, and go into FOLDER.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from fedlscl.audit.attack import Made
from fedlscl.audit.contents import Contents
from fedlscl.audit.pages import draw
from fedlscl.audit.reconstruction import Decoder, correlation, small
from fedlscl.audit.run import AuditedRun, Pool
from fedlscl.cli import main as fedlscl
from fedlscl.run.received import Sight

HERE = Path(__file__).resolve().parent
SIZE, SIDE = 32, 8
"""Pixels of the model's images, and of those that it writes into its features."""
PIXELS = SIDE * SIDE
STEEP = 1000.0
READ = 0.99
"""From which correlation with the true image on an image counts as read."""


def hostile(images: Tensor, labels: Tensor, bins: int) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Weights of the hostile ViT, and the fields of its backbone.

    Args:
        images: (n, 3, S, S) in 0..1, of nobody.
        labels: (n,).
        bins: B.
    """
    grey = 2 * small(images * 255, SIDE).mean(dim=1).flatten(1).double() - 1
    within = torch.cat([grey[labels == c] - grey[labels == c].mean(dim=0) for c in torch.unique(labels)])
    direction = torch.linalg.eigh(within.T @ within)[1][:, -1]
    thresholds = torch.quantile(grey @ direction, torch.linspace(0, 1, bins + 2, dtype=torch.float64)[1:-1])
    # features: p, one group for each threshold, a zero, m, and the two constants
    width = PIXELS * (bins + 1) + 4
    m, plus, minus = range(width - 3, width)
    constant = math.sqrt(width / 2)  # so that the deviation over the features is about 1
    patch = torch.zeros(width, 3, SIZE, SIZE, dtype=torch.float64)
    side = SIZE // SIDE
    for pixel in range(PIXELS):
        y, x = side * (pixel // SIDE), side * (pixel % SIDE)
        patch[pixel, :, y : y + side, x : x + side] = 2 / (3 * side * side)
    patch[m] = torch.einsum("p,pcyx->cyx", direction, patch[:PIXELS])
    shift = torch.zeros(width, dtype=torch.float64)
    shift[:PIXELS], shift[m] = -1, -direction.sum()
    shift[plus], shift[minus] = constant, -constant
    hidden = bins * (PIXELS + 1)
    first, second = torch.zeros(hidden, width, dtype=torch.float64), torch.zeros(width, hidden, dtype=torch.float64)
    for b, threshold in enumerate(thresholds.tolist()):
        rows = slice(b * (PIXELS + 1), (b + 1) * (PIXELS + 1))  # the last of them without a pixel
        first[rows, m], first[rows, plus] = STEEP, -STEEP * threshold / (2 * constant) - STEEP / 2
        first[rows, minus] = STEEP * threshold / (2 * constant) - STEEP / 2  # less what normalisation has shifted m by
        for pixel in range(PIXELS):
            row, out = b * (PIXELS + 1) + pixel, PIXELS * (b + 1) + pixel
            first[row, pixel] = 1
            first[row, plus] -= 0.5
            first[row, minus] -= 0.5
            second[out, row], second[out, rows.stop - 1] = 1, -1
    shown = torch.ones(width)
    shown[[m, plus, minus]] = 0
    ones, zeros = torch.ones(width), torch.zeros(width)
    state = {
        "patch_embed.proj.weight": patch,
        "patch_embed.proj.bias": shift,
        **{
            f"blocks.0.{norm}.{name}": t.clone()
            for norm in ("norm1", "norm2")
            for name, t in (("weight", ones), ("bias", zeros))
        },
        "blocks.0.attn.qkv.weight": torch.zeros(3 * width, width),
        "blocks.0.attn.qkv.bias": torch.zeros(3 * width),
        "blocks.0.attn.proj.weight": torch.zeros(width, width),
        "blocks.0.attn.proj.bias": zeros.clone(),
        "blocks.0.mlp.fc1.weight": first,
        "blocks.0.mlp.fc1.bias": torch.zeros(hidden),
        "blocks.0.mlp.fc2.weight": second,
        "blocks.0.mlp.fc2.bias": zeros.clone(),
        "norm.weight": shown,
        "norm.bias": zeros.clone(),
    }
    args: dict[str, object] = {
        "patch_size": SIZE,
        "embed_dim": width,
        "depth": 1,
        "num_heads": 1,
        "mlp_ratio": hidden / width,
    }
    args |= {"class_token": False, "global_pool": "avg", "pos_embed": "none", "fc_norm": False}
    return {name: tensor.float().contiguous() for name, tensor in state.items()}, args


def read(contents: Contents, label: int, bins: int) -> Tensor:
    """Pictures (n, 1, S, S), of no known contrast, that the sums of a class give where the model is hostile."""
    assert contents.sums is not None
    found = []
    for sums in contents.sums[:, label]:
        groups = sums[: PIXELS * (bins + 1)].reshape(bins + 1, PIXELS) - sums[PIXELS * (bins + 1)]
        apart = groups - torch.cat([groups[1:], torch.zeros(1, PIXELS, dtype=torch.float64)])
        found += [part.reshape(1, SIDE, SIDE) for part in apart if float(part.norm()) > 1e-3]
    return torch.stack(found) if found else torch.zeros(0, 1, SIDE, SIDE, dtype=torch.float64)


class Reading:
    """What was read in the messages of a run."""

    def __init__(self) -> None:
        self.images, self.read, self.by_mean, self.alike, self.mean = 0, 0, 0, list[float](), list[float]()
        self.made = Made()

    def take(self, true: Tensor, made: Tensor, usual: Tensor) -> None:
        """Note images (n, 1, S, S) of a class beside the pictures (k, 1, S, S) that were made, and a public mean."""
        best = torch.full((len(true),), -1.0, dtype=torch.float64)
        which = torch.zeros(len(true), dtype=torch.int64)
        for k, picture in enumerate(made):
            alike = correlation(picture.expand_as(true), true)
            which[alike > best], best = k, torch.maximum(alike, best)
        of_mean = correlation(usual.expand_as(true), true)
        self.images += len(true)
        self.read += int((best > READ).sum())
        self.by_mean += int((of_mean > READ).sum())
        self.alike += best.tolist()
        self.mean += of_mean.tolist()
        for row in range(min(1, len(made))):
            picture = made[which[row]]
            scaled = (picture - picture.min()) / (picture.max() - picture.min()).clamp(min=1e-9)
            shown, scaled, mean = (x.float().expand(3, SIDE, SIDE) for x in (true[row], scaled, usual))
            self.made.pictures.append((shown, scaled, mean))

    @property
    def cells(self) -> str:
        """A row's numbers."""
        return f"{self.read} of {self.images} | {self.by_mean} | {np.mean(self.alike):.3f} | {np.mean(self.mean):.3f}"


def fit(folder: Path, seed: int, words: list[str]) -> AuditedRun:
    """Run `fed_ridge` on the digits, and take what its server received."""
    given = ["--config", str(HERE / "digits.yaml"), "--config", str(HERE / "methods" / "fed_ridge.yaml")]
    given += ["--federation.rounds", "1", "--data.split.train_per_class", "70", "--seed_everything", str(seed)]
    given += ["--tracking.received", "true", "--tracking.wandb_mode", "disabled", "--run_dir", str(folder)]
    fedlscl(["fit", *given, *words])
    return AuditedRun(folder)


def readings(run: AuditedRun, bins: int | None) -> Mapping[str, Reading]:
    """What single uploads and sums give; `bins` of the hostile model, None for a decoder behind the honest one."""

    def pixels(pool: Pool) -> Tensor:
        return small(run.pixels(pool), SIDE).mean(dim=1, keepdim=True).double()

    found, public = dict[str, Reading](), pixels(run.public)
    width = run.template.vit.width
    decoder = None
    if bins is None:
        features = run.features(0, "end", run.public)
        assert features is not None
        decoder = Decoder(features, small(run.pixels(run.public), SIDE), 0)
    views: list[tuple[str, list[Sight]]] = [
        ("one client's upload", run.uploads()),
        ("sum over the clients", run.totals()),
    ]
    for view, sights in views:
        for sight in sights:
            contents = Contents.of(sight.tensors, width)
            assert contents.sums is not None
            pools = [next(iter(run.members(client, sight).values())) for client in sight.clients]
            true, labels = torch.cat([pixels(pool) for pool in pools]), torch.cat([pool.labels for pool in pools])
            for label in torch.unique(labels).tolist():
                if bins is not None:
                    made = read(contents, label, bins)
                else:
                    assert decoder is not None
                    assert contents.counts is not None
                    sums, counts = contents.sums[:, label], contents.counts[:, label]
                    made = decoder(sums[counts > 0] / counts[counts > 0, None]).mean(dim=1, keepdim=True).double()
                usual = public[run.public.labels == label].mean(dim=0)
                found.setdefault(view, Reading()).take(true[labels == label], made, usual)
    return found


def main() -> None:
    """Run, attack, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 1999, 2024])
    parser.add_argument("--bins", type=int, default=16)
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    given, fields = parser.parse_args(words[:end]), words[end + 1 :]
    noise = ["--federation.secure", "true", "--model.privacy.epsilon", "8", "--model.privacy.noise", "seed"]
    lines = []
    for seed in given.seeds:
        honest = fit(given.folder / f"honest-{seed}", seed, fields)
        public = honest.public
        state, args = hostile(small(honest.pixels(public), SIZE), public.labels, given.bins)
        weights = given.folder / f"hostile-{seed}.safetensors"
        save_file(state, weights)
        words = [*fields, "--backbone.weights", str(weights), "--backbone.model_args", str(args).replace("'", '"')]
        words += ["--backbone.mean", "[0,0,0]", "--backbone.std", "[1,1,1]"]
        runs = {"honest": (honest, None), "hostile": (fit(given.folder / f"hostile-{seed}", seed, words), given.bins)}
        runs["hostile, epsilon 8"] = fit(given.folder / f"noise-{seed}", seed, [*words, *noise]), given.bins
        for model, (run, bins) in runs.items():
            for view, reading in readings(run, bins).items():
                seen = run.summary.accuracy["seen"].final_average
                lines.append(f"| {model} | {view} | {seed} | {seen:.1f} | {reading.cells} |")
                if seed == given.seeds[0] and reading.made.pictures:
                    name = f"{model}-{view}".replace(" ", "_").replace(",", "").replace("'", "")
                    draw(reading.made, f"{model} model, {view}, read by the server", given.folder / f"{name}.png")
    print("| model | the server has | seed | `seen` | images read | by the class mean | similarity | class mean |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
