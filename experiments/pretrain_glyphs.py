"""Pretrain the small ViT of the quickstart on rendered glyphs that contain no digit.

The foundation model of the quickstart must not have seen what the federation learns, the ten digits. So it
learns to tell letters, symbols and signs of many scripts apart, rendered from the fonts that ship inside
matplotlib and distorted until they look like small handwriting. Neither code points of Unicode's number
categories nor look-alikes of digits are drawn.

    python experiments/pretrain_glyphs.py --out fedlscl/models/weights/vit_glyph_patch8_32.fp16.safetensors
    python experiments/pretrain_glyphs.py --evaluate fedlscl/models/weights/vit_glyph_patch8_32.fp16.safetensors
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import timm
import torch
from matplotlib.ft2font import FT2Font
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

GLYPH_SIZE, IMAGE_SIZE, DIGITS_SIZE = 64, 32, 8
NEIGHBOURS, HELD_OUT_EVERY = 5, 8
SAME_SHAPE, MIN_FACES, BATCH = 0.7, 4, 64

# Faces with a Unicode character map; the Computer Modern ones keep to it for ASCII letters only.
# None is bold: thicker strokes come from the distortion.
UNICODE_FONTS = (
    *("DejaVuSans", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Italic"),
    *("STIXGeneral", "STIXGeneralItalic"),
)
LETTER_FONTS = ("cmmi10", "cmr10", "cmss10", "cmti10", "cmtt10")

# Inclusive ranges of code points.
BLOCKS = (
    *((0x0021, 0x007E), (0x00A1, 0x00FF), (0x0180, 0x02AF)),  # Latin and phonetic
    *((0x0370, 0x058F), (0x10A0, 0x10FF)),  # Greek, Cyrillic, Armenian; Georgian
    *((0x20A0, 0x20BF), (0x2190, 0x21B5), (0x2200, 0x220F), (0x2C60, 0x2C7F)),  # signs; more Latin
)

# Code points of letters and signs that may pass for a digit in handwriting, from 0 on to 9.
_LOOK_ALIKES = """
    0043 0044 004F 0051 0063 006F 00B0 00D8 00F8 0186 019F 01B1 0251 0252 0254 0275 0277 0298 0398 039F 03B8
    03BF 03C3 03D8 03FC 041E 0421 043E 0441 0472 0473 047A 047B 04E8 04E9 051A 0555 0585 10D8 10E2 2205 2C6D
    2C70
    0021 0049 004A 0069 006A 006C 007B 007C 007D 00A1 00A6 0196 0197 019A 01AA 01C0 01C1 01C3 0248 0268 0269
    026A 026B 027A 027F 0399 03B9 0406 0408 0456 0458 04C0 04CF 2191 2193 21A5 21A8 2C61
    005A 007A 01A7 01A8 01B5 01B6 01B8 01BB 02A1 02A2 02AB 0396 03E8 03E9 0536 0541 0547 0577 057B 2C6B 2C6C
    018E 0190 01B7 01BA 01DD 021C 021D 0258 025B 025C 025D 025E 026E 0292 0293 037B 037D 03B5 03F6 03FD 03FF
    0404 0417 042D 0437 044D 0454 0498 0499 04E0 04E1 0510 0511 0545 10D5 10D9 10DE 10F3 10F4 2203 220B 220D
    2C79 2C7B
    004C 0265 027B 0287 03E4 03E5 0427 0447 04B6 04B7 04B8 04B9 04CB 04CC 053C 053F 054E 056F 057E
    0024 0042 0053 0073 00A7 0182 0183 01BC 01BD 01BE 024E 02A6 02AA 0405 0411 0455 054F
    0047 0062 00F0 0180 0184 0185 018B 018D 01E4 0253 0262 03B4 03EC 03ED 042A 042C 0431 044A 044C 048C 048D
    0494 0495 0501 050C 050D 0573 10B1 10BA 10D0 10D1 10D2 10DC 10E1 10EE 2202
    002F 003F 00AC 00BF 0241 0242 027C 0294 0295 0393 0413 0433 055B 10A8 10BF 2207
    0025 0026 0061 00DF 0222 0223 0243 0299 0392 03B2 0412 0430 0432 0551 10B7 10BD 10DB 10E7 10F0 10F8
    0064 0067 0070 0071 018C 01E5 024A 024B 0256 0260 0261 029B 02A0 03C1 03D9 0444 0503 051B 0533 0563 0566
    0581 10F9
"""
LOOK_ALIKES = frozenset(chr(int(code, 16)) for code in _LOOK_ALIKES.split())


def candidates() -> Iterator[str]:
    """Yield the characters of `BLOCKS` that are neither numbers, look-alikes of digits nor accented forms."""
    for first, last in BLOCKS:
        for character in map(chr, range(first, last + 1)):
            kind = unicodedata.category(character)[0]  # letters, symbols, punctuation; N are the numbers
            if kind in "LSP" and character not in LOOK_ALIKES and not unicodedata.decomposition(character):
                yield character


def render(font: FT2Font, character: str) -> np.ndarray | None:
    """Draw one character in an open face, white on black, its ink filling the square.

    Returns:
        `uint8 [GLYPH_SIZE, GLYPH_SIZE]`; None if the face lacks the character or it is a mere dot or bar.
    """
    if font.get_char_index(ord(character)) == 0:
        return None
    font.set_text(character, 0.0)
    font.draw_glyphs_to_bitmap(antialiased=True)
    ink = np.asarray(font.get_image())
    rows = np.nonzero(ink.max(axis=1, initial=0) > 64)[0]
    columns = np.nonzero(ink.max(axis=0, initial=0) > 64)[0]
    if len(rows) < 12 or len(columns) < 12 or not 0.3 < len(columns) / len(rows) < 2.2:
        return None
    cropped = torch.from_numpy(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32))
    scale = (GLYPH_SIZE - 8) / max(cropped.shape)
    size = [max(1, round(side * scale)) for side in cropped.shape]
    resized = F.interpolate(cropped[None, None], size=size, mode="bilinear", antialias=True)[0, 0]
    top, left = ((GLYPH_SIZE - side) // 2 for side in size)
    canvas = np.zeros((GLYPH_SIZE, GLYPH_SIZE), dtype=np.uint8)
    canvas[top : top + size[0], left : left + size[1]] = resized.round().clamp(0, 255).numpy()
    return canvas


def draw_glyphs() -> tuple[Tensor, Tensor, list[str]]:
    """Draw every glyph class in every face that has it.

    Of characters that look the same, such as the letter A of three scripts, only the first makes a class, and
    those that fewer than `MIN_FACES` faces have make none.

    Returns:
        Drawings `uint8 [n, GLYPH_SIZE, GLYPH_SIZE]`, their classes `int64 [n]`, and each class's character.
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = {name: FT2Font(str(folder / f"{name}.ttf")) for name in (*UNICODE_FONTS, *LETTER_FONTS)}
    for font in fonts.values():
        font.set_size(64, 72)
    kept: list[str] = []
    drawings: list[np.ndarray] = []
    labels: list[int] = []
    seen = torch.empty(0, 256)
    for character in candidates():
        ascii_letter = character.isascii() and character.isalpha()
        names = (*UNICODE_FONTS, *LETTER_FONTS) if ascii_letter else UNICODE_FONTS
        sans = render(fonts[names[0]], character)
        if sans is None:
            continue
        shape = F.avg_pool2d(torch.from_numpy(sans).float()[None], 4).flatten(1)
        shape = F.normalize(shape - shape.mean(), dim=1)
        if (seen @ shape.T > SAME_SHAPE).any():
            continue
        others = (render(fonts[name], character) for name in names[1:])
        faces = [sans, *(drawn for drawn in others if drawn is not None)]
        if len(faces) < MIN_FACES:
            continue
        seen = torch.cat([seen, shape])
        labels += [len(kept)] * len(faces)
        kept.append(character)
        drawings += faces
    return torch.from_numpy(np.stack(drawings)), torch.tensor(labels), kept


def handwrite(drawings: Tensor, generator: torch.Generator) -> Tensor:
    """Distort drawings `uint8 [n, GLYPH_SIZE, GLYPH_SIZE]` until they look like 8x8 scans of handwriting.

    Returns:
        Model inputs `float32 [n, 3, IMAGE_SIZE, IMAGE_SIZE]` in -1..1.
    """
    n = len(drawings)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)

    angle, shear = uniform(-0.2, 0.2), uniform(-0.3, 0.3)
    width, height = uniform(0.7, 1.1), uniform(0.85, 1.1)
    steps = (torch.arange(IMAGE_SIZE) + 0.5) * 2 / IMAGE_SIZE - 1
    column, row = steps + uniform(-0.1, 0.1), steps[:, None] + uniform(-0.08, 0.08)
    u = (angle.cos() * column - angle.sin() * row) / width
    v = (angle.sin() * column + angle.cos() * row) / height
    field = torch.randn(n, 2, 4, 4, generator=generator) * uniform(0.0, 0.1)
    bend = F.interpolate(field, size=IMAGE_SIZE, mode="bicubic")
    grid = torch.cat([u + shear * v, v], dim=1) + bend
    image = drawings[:, None].float() / 255
    image = F.grid_sample(image, grid.permute(0, 2, 3, 1), mode="bilinear", align_corners=False)

    weight = uniform(-0.4, 1.6)  # below 0 the strokes get thinner, above 0 thicker
    thick = F.max_pool2d(image, 3, stride=1, padding=1)
    thicker = F.max_pool2d(thick, 3, stride=1, padding=1)
    thin = -F.max_pool2d(-image, 3, stride=1, padding=1)
    image = image + weight.clamp(0, 1) * (thick - image) + (weight - 1).clamp(0, 1) * (thicker - thick)
    image = image + (-weight).clamp(0, 1) * (thin - image)
    blurred = F.avg_pool2d(image, 3, stride=1, padding=1, count_include_pad=False)
    image = image + uniform(0, 1) * (blurred - image)

    coarse = F.avg_pool2d(image, IMAGE_SIZE // DIGITS_SIZE)
    coarse = coarse + uniform(0, 0.05) * torch.randn(coarse.shape, generator=generator) * (coarse > 0.02)
    coarse = F.interpolate(coarse, size=IMAGE_SIZE, mode="bilinear")
    image = torch.where(uniform(0, 1) < 0.85, coarse, image)
    image = (image.clamp(0, 1) ** uniform(0.6, 1.2) * uniform(0.85, 1.3)).clamp(0, 1)
    return ((image - 0.5) / 0.5).expand(-1, 3, -1, -1)


def build_vit(seed: int) -> nn.Module:
    """Build the untrained ViT: 12 blocks of width 96 over sixteen 8x8 patches; it returns the class token."""
    shape = {"img_size": IMAGE_SIZE, "patch_size": 8, "embed_dim": 96, "depth": 12, "num_heads": 3}
    with torch.random.fork_rng(devices=[]):  # timm draws from the global generator
        torch.manual_seed(seed)
        vit: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=0, **shape)  # type: ignore[arg-type]
    for module in vit.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", False)  # noqa: B010 (declared final); with 17 tokens this is faster
    return vit


@torch.no_grad()
def features(vit: nn.Module, images: Tensor) -> Tensor:
    """Class tokens after the final norm, unit length: `[n, 3, 32, 32] -> [n, 96]`."""
    return F.normalize(vit.eval()(images), dim=1)


def knn_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor) -> float:
    """Percentage of queries `[m, d]` given their class by a vote of the nearest bank vectors `[n, d]`.

    Vectors have unit length, labels are `int64 [n]` and `[m]`; a tie goes to the nearer neighbours.
    """
    similarity, index = (queries @ bank.T).topk(NEIGHBOURS)
    votes = torch.zeros(len(queries), int(bank_labels.max()) + 1)
    votes.scatter_add_(1, bank_labels[index], 1 + 1e-3 * similarity)
    return 100 * (votes.argmax(1) == query_labels).float().mean().item()


def digits_knn(vit: nn.Module) -> dict[str, float]:
    """Measure k-NN accuracy on scikit-learn's digits, in per cent.

    The last 30 % of every class, by position in the data set, are the queries; the bank is the first 70 %, or
    the first ten images of every class.
    """
    data = load_digits()
    labels = torch.from_numpy(data.target).long()
    pixels = torch.from_numpy(data.images / 16).float()[:, None]
    images = F.interpolate(pixels, size=IMAGE_SIZE, mode="bilinear")
    vectors = features(vit, ((images - 0.5) / 0.5).expand(-1, 3, -1, -1))
    per_class = [(labels == digit).nonzero()[:, 0] for digit in range(10)]
    queries = torch.cat([index[int(0.7 * len(index)) :] for index in per_class])
    banks = {
        "digits_70_30": torch.cat([index[: int(0.7 * len(index))] for index in per_class]),
        "digits_10_per_class": torch.cat([index[:10] for index in per_class]),
    }
    asked = vectors[queries], labels[queries]
    return {name: knn_accuracy(vectors[bank], labels[bank], *asked) for name, bank in banks.items()}


def glyphs_knn(vit: nn.Module, drawings: Tensor, labels: Tensor) -> dict[str, float]:
    """Measure k-NN accuracy on the glyph classes that training leaves out, in per cent.

    Bank and queries hold ten distorted images of every such class; arguments as `draw_glyphs` returns them.
    """
    generator = torch.Generator().manual_seed(0)
    held_out = range(0, int(labels.max()) + 1, HELD_OUT_EVERY)
    index = torch.cat([_draw((labels == label).nonzero()[:, 0], 20, generator) for label in held_out])
    vectors = features(vit, handwrite(drawings[index], generator)).view(len(held_out), 2, 10, -1)
    target = torch.arange(len(held_out)).repeat_interleave(10)
    bank, queries = vectors[:, 0].flatten(0, 1), vectors[:, 1].flatten(0, 1)
    return {"held_out_glyphs": knn_accuracy(bank, target, queries, target)}


def _draw(values: Tensor, n: int, generator: torch.Generator) -> Tensor:
    return values[torch.randint(len(values), (n,), generator=generator)]


def initialise(vit: nn.Module, generator: torch.Generator) -> None:
    """Draw initial weights that keep the activations' scale: at width 96 timm's own are too small."""
    for name, parameter in vit.named_parameters():
        if name.endswith("weight") and parameter.ndim >= 2:
            gain = 1 / math.sqrt(24) if name.endswith(("attn.proj.weight", "mlp.fc2.weight")) else 1.0
            std = gain / math.sqrt(parameter[0].numel())
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std, generator=generator)
        elif name == "pos_embed":
            nn.init.trunc_normal_(parameter, std=0.2, generator=generator)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update of each matrix is orthogonalised (Jordan et al., 2024).

    After 150 batches it names 14 % of the training glyphs, AdamW alone 1 %. PyTorch's own Muon iterates in
    bfloat16, which is slow on most CPUs; this one works in the parameters' precision.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float) -> None:
        """Take parameters of two dimensions and the learning rate."""
        super().__init__(matrices, {"lr": lr, "momentum": 0.95, "weight_decay": 0.02})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix; those of one shape are orthogonalised together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                by_shape.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in by_shape.items():
                gradient = torch.stack([matrix.grad for matrix in matrices if matrix.grad is not None])
                mean = self.state[matrices[0]].setdefault("mean", torch.zeros_like(gradient))
                mean.lerp_(gradient, 1 - group["momentum"])
                update = orthogonalise(gradient.lerp(mean, group["momentum"]))
                rate = group["lr"] * math.sqrt(max(1, shape[0] / shape[1]))
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, list(update), alpha=-rate)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Move every singular value of a stack of matrices `[n, a, b]` near 1 by five Newton-Schulz steps."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x: Tensor = matrices.mT if tall else matrices
    x = x / (x.square().sum((-2, -1), keepdim=True).sqrt() + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def train(drawings: Tensor, labels: Tensor, steps: int, seed: int) -> nn.Module:
    """Train the ViT to name the glyph classes not held out; `seed` determines every random number."""
    generator = torch.Generator().manual_seed(seed)
    trained = (label for label in range(int(labels.max()) + 1) if label % HELD_OUT_EVERY)
    pools = [(labels == label).nonzero()[:, 0] for label in trained]
    vit = build_vit(seed)
    initialise(vit, generator)
    head = nn.Linear(96, len(pools))
    nn.init.trunc_normal_(head.weight, std=0.02, generator=generator)
    nn.init.zeros_(head.bias)
    matrices = [p for name, p in vit.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    chosen = set(map(id, matrices))
    others = [p for p in (*vit.parameters(), *head.parameters()) if id(p) not in chosen]
    adam = torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.02)
    optimizers = [Muon(matrices, lr=0.02), adam]

    def shape(step: int) -> float:
        return min((step + 1) / (0.1 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, shape) for optimizer in optimizers]
    started, running = time.monotonic(), math.log(len(pools))
    vit.train()
    for step in range(1, steps + 1):
        target = torch.randint(len(pools), (BATCH,), generator=generator)
        index = torch.cat([_draw(pools[label], 1, generator) for label in target.tolist()])
        loss = F.cross_entropy(head(vit(handwrite(drawings[index], generator))), target, label_smoothing=0.1)
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        running += 0.02 * (loss.item() - running)
        if step % 100 == 0:
            print(f"step {step}/{steps}  loss {running:.3f}  {time.monotonic() - started:.0f} s", flush=True)
    return vit


def measure(vit: nn.Module, drawings: Tensor, labels: Tensor) -> dict[str, float]:
    """Both k-NN figures on the digits and the one on held-out glyphs, in per cent."""
    return {**digits_knn(vit), **glyphs_knn(vit, drawings, labels)}


def save(vit: nn.Module, path: Path, provenance: dict[str, str]) -> None:
    """Write the weights as fp16 safetensors, all at once: a reader never meets half a file."""
    weights = {name: value.half().contiguous() for name, value in vit.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(weights, partial, metadata=provenance)
    partial.chmod(0o644)
    os.replace(partial, path)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and pretrain or evaluate."""
    parser = argparse.ArgumentParser(description="Pretrain the small ViT of the quickstart on glyphs.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, help="pretrain and write the weights to this file")
    action.add_argument("--evaluate", type=Path, help="measure the weights in this file")
    parser.add_argument("--steps", type=int, default=1000, help="updates of 64 images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.threads < 1:
        parser.error(f"--steps {options.steps} and --threads {options.threads}: both must be at least 1")
    if options.evaluate and not options.evaluate.is_file():
        parser.error(f"--evaluate {options.evaluate}: no such file; write it first with --out")
    torch.set_num_threads(options.threads)
    drawings, labels, characters = draw_glyphs()
    print(f"{len(characters)} glyph classes, {len(drawings)} drawings")
    if options.evaluate:
        vit = build_vit(seed=0)
        vit.load_state_dict({name: value.float() for name, value in load_file(options.evaluate).items()})
    else:
        vit = train(drawings, labels, options.steps, options.seed).half().float()  # as a reader will see it
    figures = measure(vit, drawings, labels)
    if options.out:
        provenance = {
            "command": f"python experiments/pretrain_glyphs.py --out {options.out} "
            f"--steps {options.steps} --seed {options.seed} --threads {options.threads}",
            **{"seed": str(options.seed), "steps": str(options.steps)},
            "knn_accuracy_percent": json.dumps({name: round(value, 2) for name, value in figures.items()}),
            "glyphs": "".join(characters),
            "versions": f"torch {torch.__version__}, matplotlib {matplotlib.__version__}",
        }
        save(vit, options.out, provenance)
    runs = [measure(build_vit(seed), drawings, labels) for seed in range(3)]
    untrained = {name: sum(run[name] for run in runs) / len(runs) for name in figures}
    for title, row in {"pretrained": figures, "untrained": untrained}.items():
        print(f"{title:>10}: " + "  ".join(f"{name} {value:.1f} %" for name, value in row.items()))


if __name__ == "__main__":
    main()
