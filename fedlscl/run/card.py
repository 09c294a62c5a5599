"""The model card of a finished run: what it is, its numbers, and what of the clients can be read from the folder."""

from __future__ import annotations

import math
from collections.abc import Mapping

import yaml

from fedlscl.data.split_map import SplitMap
from fedlscl.evaluation import MASKS
from fedlscl.run.console import human_bytes
from fedlscl.run.summary import Summary

CARD = "README.md"

MEANING = {
    "task": "among the classes of the image's task",
    "seen": "among the classes that the client has learned",
    "federation": "among the classes that any client has learned",
    "none": "among all classes of the data set",
}

PRIVATE = """\
## What this folder tells of the clients

It is of a federation, whose point is that images stay where they are. **In it are**

- **each client's weights**, trained on its images: whoever has them can test whether an image was among these
  (membership inference). A head in closed form is a statistic of its images' features, and so is what some methods keep
  beside their weights (class means, Gram matrices);
- **the classes of each client** in each task, with the numbers of images, in `split.json` and below;
- **which image is whose**, by its position in the data set, in `split.json`: who has the data set knows the clients'
  images.

**Not in it** are images, the clients' choice of images for replay, features or outputs of single images, images that a
server has made or what makes them, the messages of the rounds, the metrics of the training, and the folders of the
machine that it was made on.
{promise}"""


def card(summary: Summary, found: SplitMap | None, parameters: Mapping[int, int]) -> str:
    """The text of the card, with the front matter that the Hugging Face Hub reads.

    Args:
        summary: the run's.
        found: who has which classes, if that is known.
        parameters: how many numbers each client's weights are.
    """
    title = f"{summary.method} on {summary.setting}"
    promise = f"\nPromised is {summary.privacy.text}.\n" if summary.privacy else ""
    least, most = min(parameters.values()), max(parameters.values())
    size = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    seconds = summary.seconds["total"]
    versions = ", ".join(f"{package} {version}" for package, version in summary.versions.items())
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(summary), sort_keys=False, allow_unicode=True)}---\n",
        f"# {title}\n",
        f"A federation of {len(summary.bytes_up.by_client)} clients that learned {_tasks(summary)} tasks one after "
        f"another, by fedlscl. Seed {summary.seed}; frozen model: "
        f"{summary.backbone}; {size} numbers are each client's own.\n",
        _table(summary),
        _use(summary),
        PRIVATE.format(promise=promise),
        *([_classes(found)] if found is not None else []),
        "## How it was made\n",
        f"`fedlscl fit --config config.yaml` with the data in place; {seconds:.0f} s on {summary.machine}, "
        f"with {versions}. A client sent {human_bytes(summary.bytes_up.per_client_round)} "
        f"and received {human_bytes(summary.bytes_down.per_client_round)} a round. Configuration: `config.yaml`; every "
        "number: `summary.json`.\n",
    ]
    return "\n".join(parts)


def _front_matter(summary: Summary) -> dict[str, object]:
    known = [(mask, summary.under(mask).final_average) for mask in MASKS]
    metrics = [
        {"type": "accuracy", "name": f"final average, mask {mask}", "value": round(value, 2)}
        for mask, value in known
        if not math.isnan(value)
    ]
    result = {
        "task": {"type": "image-classification"},
        "dataset": {"type": summary.setting, "name": summary.setting},
        "metrics": metrics,
    }
    return {
        "library_name": "fedlscl",
        "pipeline_tag": "image-classification",
        "tags": ["federated-learning", "continual-learning", "fedlscl", summary.method],
        "model-index": [{"name": f"{summary.method} on {summary.setting}", "results": [result]}],
    }


def _tasks(summary: Summary) -> int:
    return len(summary.under("task").table1)


def _table(summary: Summary) -> str:
    rows = [
        f"| `{mask}`{'*' if mask in summary.task_aware else ''} | {MEANING[mask]} | {found.final_average:.1f} | "
        f"{'–' if found.forgetting is None else f'{found.forgetting:.1f}'} |"
        for mask in MASKS
        if not math.isnan((found := summary.under(mask)).final_average)
    ]
    star = "\\* with parameters chosen by the task of each image, which had to be known"
    return "\n".join(
        [
            f"Accuracy in %, on {summary.evaluated_on}, mean over clients and tasks after the last task; one seed:\n",
            "| mask | predicted | final average | forgetting |",
            "| --- | --- | --- | --- |",
            *rows,
            f"\n{star}\n" if summary.task_aware else "",
        ]
    )


def _use(summary: Summary) -> str:
    task = " --task N" if "seen" in summary.task_aware else ""
    needs = f", of SHA-256 `{summary.weights_sha256}`," if summary.weights_sha256 else ""
    return (
        f"## Use\n\n```\nfedlscl predict FOLDER IMAGE --client 0{task}\n```\n\n"
        f"`FOLDER` is this one, downloaded; the version of fedlscl stands at the end. The frozen model "
        f"({summary.backbone}){needs} must be there: where `config.yaml` names a file for it, in the folder that the "
        "command is given in, unless it comes with the package.\n"
    )


def _classes(found: SplitMap) -> str:
    heading = "| client | " + " | ".join(f"task {task}" for task in range(1, found.tasks + 1)) + " | training images |"
    rows = [
        f"| {client} | "
        + " | ".join(
            ", ".join(_plain(found.names[label]) for label in found.classes(client, task))
            for task in range(1, found.tasks + 1)
        )
        + f" | {int(found.train[:, client].sum())} |"
        for client in range(found.clients)
    ]
    return "\n".join(["### Classes of each client\n", heading, "| --- " * (found.tasks + 2) + "|", *rows, ""])


def _plain(name: str) -> str:
    """A name that ends no cell and begins no markup."""
    return "".join(f"\\{sign}" if sign in "|<>[]`*_\\" else sign for sign in " ".join(name.split()))
