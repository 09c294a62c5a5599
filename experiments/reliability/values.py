"""One of three clients sends what it should not: whether the run goes on, and how far the others' accuracy moves.

Every method is run once for each attack, two tasks of two rounds on the digits; servers that average a second time with
each robust average, where the attack was not refused. With a count, so many of these runs, drawn by the seed.
"""

from __future__ import annotations

import random
import shutil
from collections import defaultdict
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from fedlscl.federation.callback import RoundResult
from fedlscl.messages import Upload
from fedlscl.robust import Averaging, Sizes
from fedlscl.run.experiment import Experiment
from fedlscl.server import Server
from reliability.small import Change, attacked, exchanging, experiment, quiet

COUNT = 10**6  # all
METHODS: list[str] | None = None  # or these alone
ATTACKER = 1
AVERAGES = ("clip", "median", "trimmed_mean")
ALIKE = (  # what makes FedAvg learn: clients with the same classes, for longer
    *("--data.split.tasks=1", "--data.split.classes_per_task=4", "--data.split.private_classes=0"),
    *("--data.split.public_classes=4", "--data.split.train_per_class=60", "--data.split.test_per_class=40"),
    *("--federation.rounds=3", "--model.init_args.epochs=6"),
)
AMONG_ALIKE = ("signs flipped", "x -50", "noise", "ones", "rows rolled", "samples 1e17")
Others = Mapping[int, Upload]


def tensors(upload: Upload, change: object) -> Upload:
    """The upload with each floating-point tensor changed, as float64."""
    assert callable(change)
    sent: dict[str, Tensor] = {}
    for name, tensor in upload.tensors.items():
        sent[name] = change(tensor.double()).to(tensor.dtype) if tensor.is_floating_point() else tensor
    return Upload(upload.client, upload.task, upload.round, upload.samples, sent)


def whole(upload: Upload, change: object) -> Upload:
    """The upload with each tensor of another kind changed."""
    assert callable(change)
    sent = {n: t if t.is_floating_point() else change(t) for n, t in upload.tensors.items()}
    return Upload(upload.client, upload.task, upload.round, upload.samples, sent)


def largest(upload: Upload, factor: float) -> Upload:
    """The upload with its largest tensor scaled."""
    name = max((n for n, t in upload.tensors.items() if t.is_floating_point()), key=lambda n: upload.tensors[n].numel())
    sent = {**upload.tensors, name: upload.tensors[name] * factor}
    return Upload(upload.client, upload.task, upload.round, upload.samples, sent)


def rank_one(tensor: Tensor) -> Tensor:
    """A matrix of rank one of the same norm, where it is one."""
    if tensor.ndim < 2 or not bool(tensor.any()):
        return tensor
    flat = tensor.flatten(1)
    made: Tensor = torch.outer(flat.sum(1), flat.sum(0))
    scale = float(flat.norm()) / max(float(made.norm()), 1e-30)
    return (scale * made).view_as(tensor)


def noise(tensor: Tensor) -> Tensor:
    """Normal numbers of the same norm."""
    drawn = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn * (float(tensor.norm()) / max(float(drawn.norm()), 1e-30))


def spike(tensor: Tensor, value: float) -> Tensor:
    """The first number replaced."""
    flat = tensor.flatten().clone()
    flat[:1] = value
    return flat.view(tensor.shape)


def counted(upload: Upload, samples: int) -> Upload:
    """The upload with another number of samples."""
    return Upload(upload.client, upload.task, upload.round, samples, upload.tensors)


def negative_count(upload: Upload) -> bytes:
    """A header that says a negative number of samples."""
    right = f'"samples": "{upload.samples}"'.encode()
    return upload.to_bytes().replace(right, f'"samples": "-{upload.samples}"'.encode()[: len(right)], 1)


def copied(upload: Upload, others: Others) -> Upload:
    """What client 0 sent, as one's own."""
    return Upload(upload.client, upload.task, upload.round, upload.samples, others[0].tensors)


def stale(upload: Upload, others: Others) -> Upload:
    """What one sent in the round before, as it was."""
    return others.get(-1, upload)


def stale_inside(upload: Upload, others: Others) -> Upload:
    """The same as if it were of this round."""
    return Upload(upload.client, upload.task, upload.round, upload.samples, stale(upload, others).tensors)


ATTACKS: dict[str, Change] = {
    "all 1e15": lambda u, _: tensors(u, lambda t: torch.full_like(t, 1e15)),
    "all 1e30": lambda u, _: tensors(u, lambda t: torch.full_like(t, 1e30)),
    "NaN": lambda u, _: tensors(u, lambda t: spike(t, torch.nan)),
    "infinity": lambda u, _: tensors(u, lambda t: spike(t, torch.inf)),
    "zeros": lambda u, _: tensors(u, torch.zeros_like),
    "ones": lambda u, _: tensors(u, torch.ones_like),
    "noise": lambda u, _: tensors(u, noise),
    "x 1000": lambda u, _: tensors(u, lambda t: 1000 * t),
    "x 50": lambda u, _: tensors(u, lambda t: 50 * t),
    "largest tensor x 1e6": lambda u, _: largest(u, 1e6),
    "signs flipped": lambda u, _: tensors(u, lambda t: -t),
    "x -50": lambda u, _: tensors(u, lambda t: -50 * t),
    "one number 1e15": lambda u, _: tensors(u, lambda t: spike(t, 1e15)),
    "one number 1": lambda u, _: tensors(u, lambda t: spike(t, 1.0)),
    "rank one": lambda u, _: tensors(u, rank_one),
    "rows rolled": lambda u, _: tensors(u, lambda t: t.roll(1, 0) if t.ndim else t),
    "whole numbers rolled": lambda u, _: whole(u, lambda t: t.roll(1, 0) if t.ndim else t),
    "whole numbers largest": lambda u, _: whole(u, lambda t: torch.full_like(t, 1 if t.dtype == torch.bool else 2**30)),
    "whole numbers -1": lambda u, _: whole(u, lambda t: torch.full_like(t, 0 if t.dtype == torch.bool else -1)),
    "copy of another": copied,
    "stale message": stale,
    "stale tensors": stale_inside,
    "samples 1e17": lambda u, _: counted(u, 10**17),
    "samples 0": lambda u, _: counted(u, 0),
    "samples negative": lambda u, _: negative_count(u),
}


class Outcome(NamedTuple):
    """What became of a run."""

    accuracy: float  # `seen` in % of the other clients after the last task
    refused: bool  # whether the attacker was left out of a round
    unanswered: int  # answers that could not be used
    others: int  # rounds that another client was left out of
    ended: str  # why the run came to no end, if it did


def outcome(described: Experiment, folder: Path, change: Change) -> Outcome:
    """Run it."""
    try:
        results = attacked(described, folder, ATTACKER, change)
    except Exception as error:
        return Outcome(float("nan"), False, 0, 0, f"{type(error).__name__}: {error}"[:200])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Outcome(
        of_others(results[-1]),
        any(ATTACKER in result.skipped for result in results),
        sum(len(result.unanswered) for result in results),
        sum(client != ATTACKER for result in results for client in result.skipped),
        "",
    )


def of_others(result: RoundResult) -> float:
    """The mean of the accuracies under `seen` of all clients but the attacker, in %."""
    rows = [row for client, row in enumerate(result.accuracy["seen"]) if client != ATTACKER]
    return sum(sum(row) / len(row) for row in rows) / len(rows)


class Watched:
    """Notes the largest honest ratio of a tensor's size to the median of its round, by server."""

    def __init__(self) -> None:
        self.largest: dict[str, tuple[float, str]] = {}
        self.compare = Server.compare

    def __enter__(self) -> Watched:
        """Look on."""
        watched = self

        def compare(server: Server, found: Mapping[int, Sizes], before: Sizes) -> dict[int, str]:
            for name in next(iter(found.values())):
                sizes = [one[name] for one in found.values() if name in one]
                if len(sizes) > 2 and median(sizes) > 0:
                    ratio = max(sizes) / median(sizes), name
                    kind = type(server).__name__
                    watched.largest[kind] = max(watched.largest.get(kind, (0.0, "")), ratio)
            return watched.compare(server, found, before)

        Server.compare = compare  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *_: object) -> None:
        """No longer."""
        Server.compare = self.compare  # type: ignore[method-assign]


def with_average(described: Experiment, average: str) -> Experiment:
    """The experiment with a robust average in its server."""
    described.server.mean = Averaging(average)  # type: ignore[arg-type, attr-defined]
    return described


@quiet()
def run(folder: Path, seed: int, count: int) -> tuple[str, int]:
    """Do all, or `count` drawn by `seed`; the findings, and how many runs came to no end or left out another client."""
    cases = [(name, attack) for name in METHODS or exchanging() for attack in ATTACKS]
    if count < len(cases):
        cases = sorted(random.Random(seed).sample(cases, count))
    by_method: dict[str, list[str]] = defaultdict(list)
    for name, attack in cases:
        by_method[name].append(attack)
    honest: dict[tuple[str, str], Outcome] = {}
    found: dict[tuple[str, str, str], Outcome] = {}
    repeated: set[str] = set()
    with Watched() as watched:
        for name in by_method:
            described = experiment(name, folder)
            honest[name, "none"] = outcome(described, folder / "run", lambda upload, _: upload)
        ratios = dict(watched.largest)
    for name in sorted(by_method, key=lambda name: (name != "fedavg", name)):
        described = experiment(name, folder)
        attacks = by_method[name]
        for attack in attacks:
            found[name, "none", attack] = outcome(described, folder / "run", ATTACKS[attack])
        kind = type(described.server).__name__
        if "robust" not in signature(type(described.server)).parameters or kind in repeated:
            continue
        repeated.add(kind)
        for average in AVERAGES:
            described = with_average(described, average)
            honest[name, average] = outcome(described, folder / "run", lambda upload, _: upload)
            for attack in (a for a in attacks if not found[name, "none", a].refused):
                found[name, average, attack] = outcome(described, folder / "run", ATTACKS[attack])
    text, faults = report(honest, found, ratios)
    alike, more = among_alike(folder)
    every = len(METHODS or exchanging()) * len(ATTACKS)
    drawn = f"{len(cases)} of {every} cases (`--count`), and these again with robust averages."
    return f"{drawn} {text}\n\n{alike}", faults + more


def among_alike(folder: Path) -> tuple[str, int]:
    """FedAvg where it learns something: a table, and how many runs came to no end."""
    rows = ["| average | honest | " + " | ".join(AMONG_ALIKE) + " |", "| --- " * (len(AMONG_ALIKE) + 2) + "|"]
    ended = 0
    described = experiment("fedavg", folder, *ALIKE)
    for average in ("none", *AVERAGES):
        described = with_average(described, average)
        honest = outcome(described, folder / "run", lambda upload, _: upload)
        results = [outcome(described, folder / "run", ATTACKS[attack]) for attack in AMONG_ALIKE]
        ended += sum(bool(result.ended) for result in (honest, *results))
        cells = [f"{r.accuracy:.1f}{' (refused)' if r.refused else ''}" for r in results]
        rows.append(f"| {average} | {honest.accuracy:.1f} | {' | '.join(cells)} |")
    said = (
        "Averages of clients with other classes are near chance here, so that the table above shows that runs go on, "
        "and little of what a robust average is worth. FedAvg on three clients that have the same four classes, one "
        "task of three rounds, accuracy of the two others in %:"
    )
    return "\n".join([said, "", *rows]), ended


def report(
    honest: Mapping[tuple[str, str], Outcome],
    found: Mapping[tuple[str, str, str], Outcome],
    ratios: Mapping[str, tuple[float, str]],
) -> tuple[str, int]:
    """What was found, in Markdown, and the number of faults."""
    bad = {case: result for case, result in found.items() if result.ended or result.others}
    bad |= {(*case, "honest"): r for case, r in honest.items() if r.ended or r.others or r.refused}
    lines = [
        f"Client {ATTACKER} of 3 attacks in all four rounds, in {len(ATTACKS)} ways: {', '.join(ATTACKS)}.",
        "",
        f"{len(found)} attacked runs, of which {sum(bool(r.ended) for r in found.values())} came to no end and in "
        f"{sum(bool(r.others) for r in found.values())} a client other than the attacker was left out of a round; in "
        f"{sum(bool(r.unanswered) for r in found.values())} some answer could not be used, and clients kept their "
        "models.",
        "",
        "Accuracy is `seen` of the two others after the last task, in %; the change is that from the honest run, of "
        "the attacks that were not refused.",
        "",
        "| method | average | honest | attacks | refused | mean change | worst change | by |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (name, average), base in honest.items():
        results = {a: r for (n, v, a), r in found.items() if (n, v) == (name, average)}
        moved = {a: r.accuracy - base.accuracy for a, r in results.items() if not (r.refused or r.ended)}
        worst = min(moved, key=lambda a: moved[a], default="")
        numbers = (f"{sum(moved.values()) / len(moved):+.1f}", f"{moved[worst]:+.1f}") if moved else ("", "")
        lines.append(
            f"| {name} | {average} | {base.accuracy:.1f} | {len(results)} | "
            f"{sum(r.refused for r in results.values())} | {numbers[0]} | {numbers[1]} | {worst} |"
        )
    said = "; ".join(f"{kind} {ratio:.1f} ('{name}')" for kind, (ratio, name) in sorted(ratios.items()))
    lines += ["", f"Largest ratio of a tensor's size to the median of its round in the honest runs, by server: {said}."]
    lines += ["", *(f"- FAULT {', '.join(case)}: {r.ended or 'somebody else was left out'}" for case, r in bad.items())]
    return "\n".join(lines), len(bad)
