"""One page with a ranking for each setting, from summaries that anybody may add, and the rule by which they do."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from fedlscl.analysis.comparison import Comparison, Variant
from fedlscl.analysis.formats import MISSING, Cell, Table, to_markdown
from fedlscl.analysis.results import Run
from fedlscl.analysis.rows import (
    BELOW,
    KEPT,
    STAR,
    accuracies,
    final,
    kept,
    number,
    ordered,
    promised,
    seeds,
    sentences,
    unnamed,
)
from fedlscl.run.console import human_bytes

SEEDS = 3
"""Runs with as many seeds a row takes."""

RULE = """\
# Leaderboard

Final average over clients and tasks in %, ± deviation over seeds, of every method of which there are three seeds or
more; a table for each setting, backbone and set of test images, since only these can be compared. Ranked is the mask
`seen`: all classes that a client has learned compete. Made from the summaries in this folder, and checked against them
by a test, with

```
fedlscl tables {folders} --leaderboard experiments/results/leaderboard.md
```

**Add a row** by a pull request with

1. the `summary.json` of three runs or more, seeds 42, 1999 and 2024 first, as
   `experiments/results/SETTING/METHOD-seedSEED.json`: of a setting in `experiments/` as it is, or of a new one, whose
   YAML comes along;
2. the commit, without local changes, at which they were made, which has the method: its file in `fedlscl/methods/`, or
   a folder with its code and YAML, and a page on what it does and where it departs from its publication;
3. the command of each run as it was typed. What was tuned was tuned on held-out training images
   (`--data.split.local_test holdout30`); say what, and in how many trials;
4. this page and the tables made anew by the command above.

A row leaves again where the numbers do not come out of the command: on the same kind of processor to the last bit,
elsewhere within the deviation over seeds.
"""


def leaderboard(comparisons: Sequence[Comparison], folders: Sequence[str]) -> str:
    """The page, in Markdown.

    Args:
        comparisons: what :func:`fedlscl.analysis.comparison.compare` returns.
        folders: the words by which the runs were named on the command line, for the page to say so.

    Raises:
        ValueError: if no method has enough seeds.
    """
    parts = [RULE.format(folders=" ".join(folders))]
    for comparison in comparisons:
        ranked = [variant for variant in comparison.usual if len(variant.runs) >= SEEDS]
        if not ranked:
            continue
        few = sorted(variant.label for variant in comparison.usual if len(variant.runs) < SEEDS)
        parts.append(f"## {to_heading(comparison)}\n\n{to_markdown(_table(comparison, ranked))}")
        if few:
            parts.append(f"With fewer seeds, and thus not here: {', '.join(few)}.\n")
    if len(parts) == 1:
        raise ValueError(f"no method has the {SEEDS} seeds that a row of the leaderboard takes")
    return "\n".join(parts)


def to_heading(comparison: Comparison) -> str:
    """The setting, in one line without markup."""
    return " ".join(comparison.setting.split()).replace("<", "&lt;")


def _table(comparison: Comparison, ranked: Sequence[Variant]) -> Table:
    rows = ordered(ranked, final("seen"))
    columns = [accuracies(rows, final(mask), mask) for mask in ("seen", "task")]
    columns.append(accuracies(rows, _forgetting, "seen", least=True))
    private = any(promised(variant).numbers for _, variant in rows)
    cells = []
    for place, (name, variant) in enumerate(rows):
        assert variant is not None  # nothing is missing where no method is required
        cells.append(
            (
                Cell(MISSING) if variant.pooled else number(place + 1, 0),
                Cell(name),
                *(replace(column[place], mark="") for column in columns),
                _sent(variant),
                kept(variant),
                *([promised(variant)] if private else []),
                seeds(variant),
            )
        )
    return Table(
        "leaderboard",
        "Final average under seen, best first",
        comparison.title,
        sentences(f"Rows {BELOW}", STAR, KEPT, unnamed(comparison, rows)),
        (
            *("rank", "method", "seen", "task", "forgetting, seen", "sent, whole run", "images kept"),
            *(("epsilon",) if private else ()),
            "seeds",
        ),
        tuple(cells),
    )


def _forgetting(run: Run) -> float | None:
    return run.forgetting["seen"]


def _sent(variant: Variant) -> Cell:
    """Bytes of all messages in both directions, of all clients."""
    if variant.pooled:
        return Cell(MISSING)
    value = statistics.mean(run.bytes for run in variant.runs)
    return Cell(human_bytes(value), numbers={"": value})
