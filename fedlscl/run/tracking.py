"""The one record of a federation over all its hundreds of fits: metrics.csv, a W&B run, any logger of Lightning's."""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import netrc
import os
import secrets
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal
from urllib.parse import urlsplit

from lightning.pytorch.loggers import Logger

from fedlscl.files import Damaged, content_of, make_folder, naming, sha256, sync, write_atomically

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

log = logging.getLogger(__name__)

HEADER = ("task", "round", "metric", "value")
STEP_METRICS = {"client/*": "round", "clients/*": "round", "server/*": "round", "eval/*": "round", "task/*": "task"}
"""Which of our own counters is the horizontal axis of a metric in W&B."""

INIT_TIMEOUT = 30.0
"""Seconds W&B's server may take to answer before an online run is given up."""

FINISH_TIMEOUT = 300.0
"""Seconds that W&B may take to send what is left at the end; it stays on the disk, for `wandb sync`."""

WandbMode = Literal["auto", "offline", "online", "disabled"]
OfClients = Literal["all", "aggregate", "none"]
"""What of single clients is recorded: all, means and deviations over clients, or nothing."""


class Tracker:
    """Record every metric of a federation once, in ``metrics.csv`` and in one W&B run.

    Once it has begun, W&B's failures end no federation: the first one is warned of, and ``metrics.csv`` has everything.

    Args:
        run_dir: folder of the run; it receives ``metrics.csv`` and, in ``wandb``, what W&B writes.
        wandb_mode: "auto" is online for a user who has logged in and not switched W&B off, offline otherwise.
        project: W&B project.
        name: W&B's display name of the run; W&B makes one up for None.
        config: the run's whole configuration, as plain values.
        run_id: W&B id of the run to go on with; None begins a new one.
        metrics_bytes: size of ``metrics.csv`` at the checkpoint a run goes on from; rows after it are
            dropped. None begins a new file.
        logger: one of Lightning's, which is told every metric too, with the round as its step.

    Raises:
        ValueError: if `wandb_mode` is unknown, is "online" for a user who is not logged in, or
            `metrics_bytes` does not end a row of the file.
        FileNotFoundError: if there is no ``metrics.csv`` to go on with.
        wandb.Error: if "online" was asked for and W&B's server cannot be used.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        wandb_mode: WandbMode = "auto",
        project: str = "fedlscl",
        name: str | None = None,
        config: Mapping[str, Any],
        run_id: str | None = None,
        metrics_bytes: int | None = None,
        logger: Logger | None = None,
    ) -> None:
        mode = wandb_is(wandb_mode)
        make_folder(run_dir)
        self._path = run_dir / "metrics.csv"
        self._csv, kept = _open_metrics(self._path, metrics_bytes)
        self._sum = hashlib.sha256(kept)
        self.run_id = run_id or secrets.token_hex(4)
        self._run: Run | None = None
        self._logger = logger
        self._warned: set[str] = set()
        try:
            if mode != "disabled":
                init = {"project": project, "name": name, "config": dict(config), "id": self.run_id}
                resumed, may_fall_back = run_id is not None, wandb_mode == "auto"
                self._run = _start(mode, run_dir, resumed=resumed, may_fall_back=may_fall_back, **init)
                self.run_id = self._run.id  # a sweep's agent imposes its own
            self._mirror(lambda logger: logger.log_hyperparams(dict(config)))
        except BaseException:
            self._csv.close()
            raise

    def log(self, metrics: Mapping[str, float], *, task: int, round: int) -> None:
        """Record numbers of one moment of the federation.

        Args:
            metrics: value by name, such as ``client/0/loss``.
            task: task being learned, from 1.
            round: running number of the round over the whole federation, from 1.

        Raises:
            ValueError: if `task` or `round` is below 1, or a metric bears the name of one of them.
        """
        if task < 1 or round < 1:
            raise ValueError(f"task and round count from 1, got task={task}, round={round}")
        if reserved := {"task", "round"} & set(metrics):
            raise ValueError(f"metrics must not be called {sorted(reserved)}: those are the axes")
        values = {metric: float(value) for metric, value in metrics.items()}
        self._add(_rows([(values, task, round)]))
        self._tell(lambda run: run.log({**values, "task": task, "round": round}))
        self._mirror(lambda logger: logger.log_metrics(values, step=round))

    def _add(self, content: bytes) -> None:
        with naming(self._path):
            self._csv.write(content)
            self._csv.flush()
        self._sum.update(content)

    def flush(self) -> int:
        """Force ``metrics.csv`` onto the disk.

        Returns:
            Its size in bytes, to be given as `metrics_bytes` when the federation goes on from here.
        """
        with naming(self._path):
            self._csv.flush()
            os.fsync(self._csv.fileno())
        return os.fstat(self._csv.fileno()).st_size

    @property
    def metrics_sha256(self) -> str:
        """The checksum of all that is in ``metrics.csv``, for `mended` before the federation goes on from here."""
        return self._sum.hexdigest()

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table in W&B.

        Args:
            name: the panel's name.
            columns: the names of the columns.
            rows: the cells, row by row.

        Raises:
            ValueError: if a row has not one cell per column.
        """
        if wrong := [row for row in rows if len(row) != len(columns)]:
            raise ValueError(f"rows of table {name!r} must have {len(columns)} cells, got {list(wrong[0])}")

        def log(run: Run) -> None:
            import wandb

            run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

        self._tell(log)

    def image(self, name: str, path: Path) -> None:
        """Show a picture in W&B.

        Args:
            name: the panel's name.
            path: the picture's file.

        Raises:
            FileNotFoundError: if there is no such file.
        """
        if not path.is_file():
            raise FileNotFoundError(f"image {name!r}: no file {path}")

        def log(run: Run) -> None:
            import wandb

            run.log({name: wandb.Image(str(path))})

        self._tell(log)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set the run's closing numbers in W&B, shown in its table of runs.

        Args:
            values: closing value by name.
        """
        self._tell(lambda run: run.summary.update(dict(values)))

    def finish(self, exit_code: int = 0) -> None:
        """Close the record; a second call does nothing.

        Args:
            exit_code: 0 for a federation that ended well.
        """
        if self._csv.closed:
            return
        try:
            self.flush()
        finally:
            with suppress(OSError):  # it would only say again what writing has said
                self._csv.close()
            self._tell(lambda run: run.finish(exit_code=exit_code))
            self._mirror(lambda logger: logger.finalize("failed" if exit_code else "success"))

    def _tell(self, tell: Callable[[Run], object]) -> None:
        if (run := self._run) is not None:
            self._without_harm("W&B", lambda: tell(run))

    def _mirror(self, tell: Callable[[Logger], object]) -> None:
        if (logger := self._logger) is not None:
            self._without_harm(type(logger).__name__, lambda: tell(logger))

    def _without_harm(self, whom: str, tell: Callable[[], object]) -> None:
        """Warn, once, of what fails: `metrics.csv` has everything."""
        try:
            tell()
        except Exception as error:  # whatever W&B or a logger, its service process and its server come up with
            if whom not in self._warned:
                warnings.warn(f"{whom} failed, the run goes on without what it was told: {error!r}", stacklevel=4)
                self._warned.add(whom)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(*() if error is None else (OSError,)):  # the first error says more than those that it leads to
            self.finish(exit_code=0 if error is None else 1)


class ClientLogger(Logger):
    """Lightning's logger for one client's fit: pass its metrics on to the federation's record.

    Args:
        tracker: the federation's record.
        prefix: put before each metric's name, such as ``client/0``.
        task: task being learned, from 1.
        round: running number of the round, from 1.
    """

    def __init__(self, tracker: Tracker, prefix: str, *, task: int, round: int) -> None:
        super().__init__()
        self._tracker, self._prefix, self._task, self._round = tracker, prefix, task, round

    @property
    def name(self) -> str:
        """The prefix: Lightning asks for a name."""
        return self._prefix

    @property
    def version(self) -> str:
        """Where in the federation the fit stands."""
        return f"task{self._task}-round{self._round}"

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record what the fit logged.

        Args:
            metrics: value by name.
            step: Lightning's step, unused: it begins anew with every fit.
        """
        ours = {f"{self._prefix}/{name}": value for name, value in metrics.items() if name != "epoch"}
        self._tracker.log(ours, task=self._task, round=self._round)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Record nothing: the configuration belongs to the federation, not to a fit."""


def _start(
    mode: Literal["offline", "online"], run_dir: Path, *, resumed: bool, may_fall_back: bool, **init: Any
) -> Run:
    """Open the W&B run, silently, with our own counters as axes; `init` goes to ``wandb.init``."""
    import wandb

    quiet = wandb.Settings(
        silent=True,
        quiet=True,
        console="off",
        disable_code=True,
        disable_git=True,
        init_timeout=INIT_TIMEOUT,
        finish_timeout=FINISH_TIMEOUT,
        finish_timeout_raises=True,
    )
    # "create_new" leaves alone a run the caller may have open.
    begin = partial(wandb.init, dir=run_dir, reinit="create_new", settings=quiet, **init)
    try:
        run = begin(mode=mode, resume="allow" if resumed and mode == "online" else None)
    except wandb.Error as error:
        if mode == "offline" or not may_fall_back:
            raise
        warnings.warn(f"W&B is out of reach, the run is tracked offline: {error}", stacklevel=3)
        wandb.teardown()  # the failed run would keep the id in use
        run = begin(mode="offline")
    for axis in ("task", "round"):
        run.define_metric(axis, hidden=True)
    for metrics, axis in STEP_METRICS.items():
        run.define_metric(metrics, step_metric=axis)
    return run


def _open_metrics(path: Path, size: int | None) -> tuple[BinaryIO, bytes]:
    """Open `path` to append rows: a new file, or the first `size` bytes of the one that is there, and what it holds."""
    if size is None:
        file = path.open("wb")
        with naming(path):
            file.write(_HEADER)
            file.flush()
        sync(path.parent)
        return file, _HEADER
    if (content := content_of(path)) is None:
        raise FileNotFoundError(f"metrics_bytes={size}, but there is no {path} to go on with")
    kept = content[: max(size, 0)]
    if len(kept) != size or not kept.startswith(_HEADER) or not kept.endswith(b"\n"):
        raise ValueError(f"metrics_bytes={size} does not end a row of {path}: is it of another run?")
    os.truncate(path, size)
    return path.open("ab"), kept


Rows = Iterable[tuple[Mapping[str, float], int, int]]
"""Numbers by name, with the task and the round that they are of."""


def mended(path: Path, size: int, sha256_: str, again: Callable[[], Rows]) -> int:
    """Check ``metrics.csv`` before a run goes on, and mend what can be mended.

    Line ends that a program has changed are changed back. A file that is missing is written anew with what the
    checkpoint knows, which is all but what clients and server logged while they trained.

    Args:
        path: the file.
        size: its size in bytes at the checkpoint.
        sha256_: its checksum up to there.
        again: what the checkpoint knows.

    Returns:
        Its size in bytes now, without what came after the checkpoint.

    Raises:
        Damaged: if it is there, and is not what the run wrote.
    """
    content = content_of(path)
    if content is not None and sha256(content[:size]) == sha256_:
        return size
    if content is not None and sha256(unix := content.replace(b"\r\n", b"\n")[:size]) == sha256_:
        log.warning("'%s' had other line ends, which are changed back", path)
        write_atomically(path, unix)
        return size
    known = _HEADER + _rows(again())
    if content is None:
        log.warning("'%s' was missing; it is written anew, without what was logged during training until here", path)
        write_atomically(path, known)
    elif not content.startswith(known):
        raise Damaged(
            f"'{path}' is damaged: put back a copy, or delete it, and the run goes on with one that is written anew "
            "from its checkpoint, without what was logged during training until there"
        )
    return len(known)


def _rows(rows: Rows) -> bytes:
    """Rows of ``metrics.csv``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for values, task, round in rows:
        writer.writerows((task, round, metric, repr(float(value))) for metric, value in values.items())
    return text.getvalue().encode()


_HEADER = ",".join(HEADER).encode() + b"\n"


def wandb_is(mode: WandbMode) -> Literal["offline", "online", "disabled"]:
    """How W&B is used, decided without network, prompt or, where it is disabled, W&B itself.

    Raises:
        ValueError: if there is no such mode, nobody is logged in for it, or the environment has settings of W&B that it
            does not take; naming the variable.
    """
    modes = ("auto", "offline", "online", "disabled")
    if mode not in modes:
        raise ValueError(f"wandb_mode must be one of {modes}, got {mode!r}")
    if mode == "disabled" or (mode == "auto" and os.environ.get("WANDB_MODE") == "disabled"):
        return "disabled"
    import wandb

    try:
        settings = wandb.setup(wandb.Settings(silent=True)).settings
    except ValueError as error:
        raise ValueError(_refused(error)) from error
    if mode == "auto" and settings.mode != "online":
        return "disabled" if settings.mode == "disabled" else "offline"
    if mode == "offline":
        return "offline"
    if settings.api_key or settings.identity_token_file or _in_netrc(settings.base_url):
        return "online"
    if mode == "online":
        raise ValueError(
            "wandb_mode is 'online', but nobody is logged in: run `wandb login` or set WANDB_API_KEY, "
            "or choose 'offline'"
        )
    return "offline"


def _refused(error: ValueError) -> str:
    """What W&B, by pydantic, does not take: its settings come from variables of the environment."""
    errors: Callable[[], list[dict[str, Any]]] = getattr(error, "errors", list)
    for one in errors():
        variable = f"WANDB_{'_'.join(map(str, one['loc']))}".upper()
        if variable in os.environ:
            return f"{variable} is '{os.environ[variable]}' in the environment: {one['msg']}; correct it, or unset it"
    return str(error)


def _in_netrc(url: str) -> bool:
    """Tell whether ``wandb login`` has left a key for `url`."""
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return netrc.netrc(str(path)).authenticators(urlsplit(url).netloc) is not None
    except (OSError, netrc.NetrcParseError):
        return False
