"""One run folder: a federation with its configuration, split, metrics, checkpoint, pictures and summary.

A run folder is continued where its checkpoint stands; whatever is in it was written completely or not at all, and is
checked against its checksum before it is used.
"""

from __future__ import annotations

import json
import logging
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.loggers import Logger
from rich.console import Console
from rich.text import Text

from fedlscl.client import Client
from fedlscl.data.module import FederatedDataModule
from fedlscl.data.source import HELD_OUT_IMAGES
from fedlscl.data.split_map import SplitMap
from fedlscl.evaluation import MASKS
from fedlscl.federation import store as checkpoint
from fedlscl.federation.algorithm import Federation, NobodyLeft
from fedlscl.federation.store import Store
from fedlscl.federation.template import MakeTrainer, Template
from fedlscl.federation.transport import InProcess, Transport, is_the_machines
from fedlscl.files import Damaged, sha256
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.run.callback import RunCallback, accuracy_arrays, known
from fedlscl.run.console import FederationProgress, summary_table
from fedlscl.run.errors import told
from fedlscl.run.fields import short
from fedlscl.run.folder import CHECKPOINT, CONFIG, METRICS, SPLIT, SUMMARY, RunFolder
from fedlscl.run.splitting import print_short
from fedlscl.run.summary import Accuracy, Compute, Promise, Skipped, Summary, Traffic, contradictory
from fedlscl.run.tracking import OfClients, Tracker, WandbMode, mended, wandb_is
from fedlscl.schedule import Schedule
from fedlscl.server import Server

log = logging.getLogger(__name__)

PACKAGES = ("fedlscl", "torch", "lightning", "torchvision", "timm", "torchmetrics", "numpy", "wandb")
PICTURE, SPLIT_PICTURE = "accuracy_over_rounds.png", "split.png"
FINGERPRINTS = {  # of what can be other than it was under a configuration that is the same
    "split_sha256": "the images' classes, or how they are split,",
    "data_sha256": "the images",
    "weights_sha256": "the foundation model's weights",
    "cnn_weights_sha256": "the small model's first weights",
}


@dataclass(frozen=True)
class Tracking:
    """Where the metrics go besides the run folder.

    Args:
        wandb_mode: auto is online for a user who is logged in to W&B, and offline otherwise; nothing ever asks.
        project: W&B project.
        received: keep all that the server receives in the run folder, for `fedlscl audit`. It tells more of the
            clients' images than any other file that a server has: delete it when it was looked at.
        logger: one of Lightning's loggers, such as TensorBoardLogger, which is told every metric too.
        clients: what is recorded of single clients: `all`; `aggregate` for means and deviations over clients; `none`
            for the accuracy over all clients alone. Training metrics that are not recorded do not leave a client's
            machine. Accuracies of single clients do, and are in the summary.
    """

    wandb_mode: WandbMode = "auto"
    project: str = "fedlscl"
    received: bool = False
    logger: Logger | None = None
    clients: OfClients = "all"

    def sends(self, secure: bool) -> bool:
        """Whether the metrics of a client's training leave it; beside a secure sum, only if they are wanted singly."""
        return self.clients == "all" or (self.clients == "aggregate" and not secure)


NOT_SET = "not set"
"""What a difference says where one of two configurations, of another version perhaps, lacks a field."""


class ImpossibleRun(ValueError):
    """A run that cannot begin as configured; the text says which field is wrong and what would be right."""


class StoppedRun(RuntimeError):
    """A run that ended before its time for a reason outside this package; the text says which, and how to go on."""


@dataclass(frozen=True)
class Experiment:
    """What a configuration describes.

    `config` is the whole configuration as plain values; it names the run and must be the same when a run goes on.
    `transport` makes what leads to the clients, by default those of this process. `overrides` is what the command line
    gave beyond its configuration files, by dotted name; it is noted in the summary and decides nothing.
    """

    setting: str
    method: str
    seed: int
    config: Mapping[str, Any]
    run_dir: Path
    schedule: Schedule
    client: Client
    server: Server
    data: FederatedDataModule
    vit: FrozenViT
    cnn: SmallModelSpec
    trainer: MakeTrainer
    tracking: Tracking
    transport: Callable[[Template, Store], Transport] = InProcess
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> None:
        """Fetch and split the data, which must be there before anything else."""
        self.data.prepare_data()
        self.data.setup()

    def run(self, console: Console) -> Summary:
        """Run or continue the federation.

        Returns:
            What `summary.json` holds.

        Raises:
            ImpossibleRun: the configuration is impossible, or the run folder belongs to another one, is in use or is
                damaged; nothing in it was changed.
            StoppedRun: the machine had trouble on the way, or no client finished a round; another call goes on.
        """
        folder, beginning = RunFolder(self.run_dir), self._beginning
        with ExitStack() as stack:
            try:
                stack.enter_context(self._locked(folder))
                folder.clean()
                summary = Summary.read_if_there(self.run_dir / SUMMARY)
                self._check_same_run(folder, beginning, summary)
                if summary is None:
                    federation = self.federation()
                    tracker = self._tracker(federation.store.progress)
            except (ValueError, OSError) as error:
                raise ImpossibleRun(str(error)) from error
            with self._stopping():
                if summary is not None:
                    console.print("This run is finished; its numbers follow. Give another --run_dir to run it again.")
                    if not (self.run_dir / PICTURE).exists():
                        self._decorate(summary, None)
                else:
                    with tracker:
                        self._show_split(console, new=not federation.history)
                        files = folder.begin(beginning, federation.store.progress.get("files", {}))
                        summary = self._go_on(files, federation, tracker, console)
            summary_table(summary, console, picture=self.run_dir / PICTURE, run_dir=self.run_dir)
        return summary

    def check(self, console: Console) -> None:
        """Do all that comes before the training and could refuse it, and say what would be run.

        Raises:
            ImpossibleRun: as `run`; nothing was written.
        """
        try:
            wandb_is(self.tracking.wandb_mode)
            self.trainer(None)
            summary = Summary.read_if_there(self.run_dir / SUMMARY)
            if self.run_dir.is_dir() and summary is None:
                self._check_same_run(RunFolder(self.run_dir), self._beginning, summary)
            with tempfile.TemporaryDirectory() as folder:
                replace(self, run_dir=Path(folder)).federation()
        except (ValueError, OSError) as error:
            raise ImpossibleRun(str(error)) from error
        behind = len(checkpoint.progress(self.run_dir / CHECKPOINT).get("history", [])) if self.run_dir.is_dir() else 0
        rounds = self.data.split.spec.tasks * self.schedule.rounds
        state = "finished, in" if summary is not None else f"to go on after round {behind}, in" if behind else "new, in"
        if (found := self.split_map) is not None:
            print_short(found, console)
        console.print(
            Text(f"run: {self.method} on {self.setting}, {rounds} rounds; {state} {self.run_dir}"), soft_wrap=True
        )
        console.print("Nothing was trained (dry_run).")

    @property
    def split_map(self) -> SplitMap | None:
        """Who has which images; None in a place that has a part of them."""
        everybody = len(self.data.split.present) == len(self.data.split.clients)
        return self.data.split_map if self.data.dataset.complete and everybody else None

    def _show_split(self, console: Console, new: bool) -> None:
        """The split in a few lines, where a run begins, and as a picture in its folder."""
        found, path = self.split_map, self.run_dir / SPLIT_PICTURE
        if found is None:
            return
        if new:
            print_short(found, console)
        if new or not path.exists():
            try:
                from fedlscl.run import plots  # and with it matplotlib

                plots.split_picture(found, path, f"{self.setting}, seed {self.seed}")
            except OSError:  # of a disk that the run needs too
                raise
            except Exception as error:  # whatever matplotlib and its fonts come up with
                log.warning("'%s' could not be drawn: %s: %s", path, type(error).__name__, error)

    @contextmanager
    def _locked(self, folder: RunFolder) -> Iterator[None]:
        with ExitStack() as stack:
            try:
                stack.enter_context(folder.lock())
            except BlockingIOError as error:
                raise ValueError(
                    f"run_dir '{self.run_dir}' is in use by another process; wait for it or give another run_dir"
                ) from error
            yield

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Say in a line what ended a run from outside."""
        try:
            yield
        except Exception as error:
            if isinstance(error, NobodyLeft | Damaged) or is_the_machines(error):
                cause = told(error) or f"{type(error).__name__}: {error}".splitlines()[0]
                raise StoppedRun(
                    f"{cause} (run_dir '{self.run_dir}' keeps the complete rounds: start the run again to go on after "
                    "them)"
                ) from error
            raise

    @property
    def _beginning(self) -> dict[str, bytes]:
        """What names the run, as files: its configuration and its split."""
        split = {
            **self._fingerprints,
            "data": self.data.dataset.name,
            "classes": list(self.data.class_names),
            "image_size": self.data.dataset.train.images.shape[-1],
            "split": json.loads(self.data.split.to_json()),
        }
        if (found := self.split_map) is not None:
            split["map"] = found.to_json()
        config = yaml.safe_dump(dict(self.config), sort_keys=False)
        return {SPLIT: json.dumps(split).encode(), CONFIG: config.encode()}

    def _check_same_run(self, folder: RunFolder, beginning: Mapping[str, bytes], summary: Summary | None) -> None:
        """Compare configuration and split with those that the run folder began with."""
        sums: Mapping[str, str] = {}
        if summary is not None and summary.config:
            self._check_same_config(summary.config)
        with suppress(*() if summary is None else (ValueError,)):  # a finished run does not need its checkpoint
            sums = folder.sums()
        if (content := folder.read(CONFIG, sums)) is not None:
            self._check_same_config(_parsed(yaml.safe_load, content, self.run_dir / CONFIG))
        if (content := folder.read(SPLIT, sums)) is not None:
            before = _parsed(json.loads, content, self.run_dir / SPLIT)
            for name, now in self._fingerprints.items():
                then = before.get(name)
                if now and then and contradictory(now, then):
                    raise ValueError(
                        f"{FINGERPRINTS[name]} are not those that the run in run_dir '{self.run_dir}' began with "
                        f"({now[:12]} now, {then[:12]} then); put the same in place, or give another run_dir"
                    )
        folder.check(beginning, sums)
        if summary is not None and sums:
            folder.begin(beginning, sums)

    def _check_same_config(self, then: Mapping[str, Any]) -> None:
        if different := differences(short(then), self.config):
            raise ValueError(
                f"run_dir '{self.run_dir}' holds a run with another configuration ({'; '.join(different)}); "
                "give another run_dir, or the same configuration to continue it"
            )

    def federation(self) -> Federation:
        """Everything that takes part, as far as the run folder's checkpoint has come."""
        store, template = Store(self.run_dir / CHECKPOINT), self.template()
        return Federation(self.schedule, template, store, self.transport(template, store))

    def template(self) -> Template:
        """What all clients are like."""
        return Template(self.client, self.data, self.vit, self.cnn, self.seed, self.trainer, self.server)

    def _tracker(self, progress: Mapping[str, Any]) -> Tracker:
        size = progress.get("metrics_bytes")
        if size is not None:
            tasks, rounds = self.data.split.spec.tasks, self.schedule.rounds
            path, history = self.run_dir / METRICS, progress["history"]
            size = mended(
                path, size, progress["metrics_sha256"], lambda: known(history, tasks, rounds, self.tracking.clients)
            )
        return Tracker(
            self.run_dir,
            wandb_mode=self.tracking.wandb_mode,
            project=self.tracking.project,
            name=self.run_dir.name,
            config=self.config,
            run_id=progress.get("wandb_id"),
            metrics_bytes=size,
            logger=self.tracking.logger,
        )

    @property
    def _fingerprints(self) -> dict[str, str | None]:
        """One for each of `FINGERPRINTS`, None where there is none to take."""
        return {
            "split_sha256": self.data.split_sha256,
            # of a part of the data nobody could tell whether it is the same data
            "data_sha256": self.data.dataset.sha256 if self.data.dataset.complete else None,
            "weights_sha256": self.vit.weights_sha256,
            "cnn_weights_sha256": self.cnn.weights_sha256,
        }

    def _go_on(self, files: Mapping[str, str], federation: Federation, tracker: Tracker, console: Console) -> Summary:
        store = federation.store
        behind = len(federation.history)
        if behind:
            console.print(f"Continuing after round {behind}.")
        tasks, rounds = self.data.split.spec.tasks, self.schedule.rounds
        taking_part = self.schedule.clients_per_round or len(self.data.split.clients)
        with FederationProgress(tasks, rounds, taking_part, completed=behind * taking_part, console=console) as bar:
            received = self.run_dir if self.tracking.received else None
            callback = RunCallback(
                tracker, bar, tasks, rounds, store.progress, files, received, self.tracking.clients,
                self.tracking.sends(self.schedule.secure),
            )  # fmt: skip
            for result in federation.run(callback):
                bar.round_done(callback.in_a_line(result))
        summary = self._summarise(store.progress, federation)
        store.commit({**store.progress, "files": {**files, SUMMARY: sha256(summary.to_json().encode())}})
        summary.write(self.run_dir / SUMMARY)
        self._decorate(summary, tracker)
        return summary

    def _summarise(self, progress: Mapping[str, Any], federation: Federation) -> Summary:
        history, clients, spec = progress["history"], federation.clients, self.data.split.spec
        acc = accuracy_arrays(history, spec.tasks, self.schedule.rounds)
        fingerprints = self._fingerprints
        pairs = self.data.tested_pairs if self.data.dataset.complete else None  # of a part nobody knows the rest
        return Summary(
            method=self.method,
            setting=self.setting,
            seed=self.seed,
            backbone=f"{self.vit.name}, {self.vit.source}, {self.vit.image_size} px",
            cnn=self.cnn.name if isinstance(self.cnn.name, str) else tuple(self.cnn.name),
            task_aware=tuple(self.client.task_aware),
            evaluated_on=self.data.source.tested_on if self.data.split.evaluate_on == "test" else HELD_OUT_IMAGES,
            split_sha256=self.data.split_sha256,
            data_sha256=fingerprints["data_sha256"],
            weights_sha256=fingerprints["weights_sha256"],
            cnn_weights_sha256=fingerprints["cnn_weights_sha256"],
            accuracy={mask: Accuracy.of(values) for mask, values in acc.items()},
            bytes_up=_traffic([entry["bytes_up"] for entry in history], clients),
            bytes_down=_traffic([entry["bytes_down"] for entry in history], clients),
            bytes_setup_per_client=federation.setup_bytes,
            compute={name: Compute(**counts) for name, counts in federation.cost().items()},
            tested_pairs=None if pairs is None else len(pairs),
            untrained_pairs=None if pairs is None else sum(not pair.trained for pair in pairs),
            images_kept=self.client.images_kept(self._fewest_classes, self.server.listens),
            privacy=self._promise(federation),
            skipped=_named(history, "skipped"),
            unanswered=_named(history, "unanswered"),
            nodes=federation.nodes,
            seconds=progress["seconds"],
            peak_memory_mib=progress["memory"],
            threads=torch.get_num_threads(),
            machine=f"{platform.system()} {platform.machine()}, {_device()}",
            versions={"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            config=dict(self.config),
            overrides=dict(self.overrides),
        )

    @property
    def _fewest_classes(self) -> int:
        """Of any client; where nobody's are known, those of all together."""
        split = self.data.split
        return min(map(sum, split.task_sizes), default=sum(map(len, split.federation)))

    def _promise(self, federation: Federation) -> Promise | None:
        """What the run has kept of the privacy that was asked for."""
        if (privacy := self.client.privacy) is None:
            return None
        tasks, again = self.data.split.spec.tasks, federation.released_again
        return Promise(
            epsilon=privacy.spent(tasks, again),
            delta=privacy.delta,
            unit=privacy.unit,
            noise=privacy.noise,
            of="sum" if self.schedule.secure else "upload",
            multiplier=privacy.multiplier(tasks),
            releases=privacy.releases(tasks) + again,
        )

    def _decorate(self, summary: Summary, tracker: Tracker | None) -> None:
        """Draw the pictures, and tell W&B how it ended: what fails here costs no number."""
        try:
            self._draw(summary, tracker)
        except Exception as error:  # whatever matplotlib, its fonts and the disk come up with
            log.warning(
                "the run is finished and its numbers are in '%s', but not all of its pictures could be drawn: %s: %s",
                self.run_dir / SUMMARY,
                type(error).__name__,
                error,
            )

    def _draw(self, summary: Summary, tracker: Tracker | None) -> None:
        from fedlscl.run import plots  # and with it matplotlib

        if tracker is not None:
            tracker.summary({f"{mask}/{k}": v for mask in MASKS for k, v in summary.accuracy[mask].scalars.items()})
        title = f"{self.method} on {self.setting}, seed {self.seed}"
        for mask in MASKS:
            path = self.run_dir / f"accuracy_matrix_{mask}.png"
            matrix = summary.accuracy[mask].matrix
            plots.accuracy_matrix(matrix, path, f"{title}, mask {mask}")
            if tracker is not None and self.tracking.clients == "all":
                tracker.image(f"accuracy_matrix/{mask}", path)
                tasks = range(len(matrix[0]))
                rows = [[client, after + 1, *row] for client, of in enumerate(matrix) for after, row in enumerate(of)]
                tracker.table(f"accuracy/{mask}", ["client", "after task", *(f"task {n + 1}" for n in tasks)], rows)
        path = self.run_dir / PICTURE  # last: without it the next start draws them all
        plots.accuracy_over_rounds(checkpoint.progress(self.run_dir / CHECKPOINT)["history"], path, title=title)
        if tracker is not None and self.tracking.clients == "all":  # it has a line for each client
            tracker.image("accuracy_over_rounds", path)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The settings in which two configurations differ, as text."""
    found = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)  # null is as good as nothing
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {old.get(key, NOT_SET)} there, {new.get(key, NOT_SET)} now")
    return found


def _traffic(rounds: list[dict[int, int]], clients: int) -> Traffic:
    """The bytes of each round by client, whose index is text once the checkpoint was read."""
    return Traffic.of(
        [[entry.get(client, entry.get(str(client))) for client in range(clients)] for entry in rounds]  # type: ignore[call-overload]
    )


def _named(history: list[dict[str, Any]], what: str) -> tuple[Skipped, ...]:
    """The clients that something is said of in some rounds; older histories lack it."""
    return tuple(
        Skipped(entry["round"], int(client), reason)
        for entry in history
        for client, reason in entry.get(what, {}).items()
    )


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    # another vector unit rounds differently, which a small model's training amplifies
    return f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _parsed(parse: Callable[[bytes], Any], content: bytes, path: Path) -> Any:
    """What a file holds that was begun before there was a checksum of it."""
    try:
        found = parse(content)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise Damaged(f"'{path}' is damaged ({' '.join(str(error).split())}): delete it, or put back a copy") from error
    if not isinstance(found, dict):
        raise Damaged(f"'{path}' is damaged (it holds no fields): delete it, or put back a copy")
    return found
