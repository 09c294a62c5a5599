"""What a person is told when something goes wrong: what is the matter, in a line, or where the whole story is kept.

It imports nothing that takes time: it is there before anything else, so that even an early Ctrl-C ends in a line.
"""

from __future__ import annotations

import codecs
import errno
import io
import json
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

REFUSED = 1
"""Exit code where something that was asked for could not be done; a line says what and why."""

MISUSED = 2
"""Exit code where the words or the configuration cannot be read: an unknown field, a value of another type."""

UNEXPECTED = 3
"""Exit code where the software itself went wrong; a line says where the traceback is."""

INTERRUPTED = 128 + signal.SIGINT
UNHEARD = 141  # 128 + SIGPIPE, which not every platform knows

TRACEBACK = "traceback.txt"
FIT = "fedlscl fit"

LENGTH = 600
"""Characters that a message has at most."""

_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "list": "a list",
    "dict": "a mapping",
    "NoneType": "null",
}

_NOISE = re.compile(
    r"Does not validate against any|Subtypes: |Errors:$|Given value( type)?: |Subclass types expect one of|"
    r"(- )?a (class path \(str\)|dict (with|without) )|Problem with given class_path|Parser key .*:$|"
    r"(- )?Parser key .*: Unable to load config"
)
_UNKNOWN = re.compile(
    r"Option '(?P<inner>[\w.-]+)' is not accepted|Group '(?P<group>[\w.-]+)' does not accept option '(?P<of>[\w.-]+)'|"
    r"unrecognized arguments: (?P<word>\S+)"
)
_EXPECTED = re.compile(r"(?:Expected|Expects) an? (.+?)(?:\. Got value: (.*))?$")


def one_line(text: str) -> str:
    """A text without line breaks and control characters, and not too long."""
    line = "".join(sign if sign.isprintable() else " " for sign in text)
    line = " ".join(word if len(word) <= 200 else f"{word[:80]}...{word[-80:]}" for word in line.split())
    return line if len(line) <= LENGTH else f"{line[: LENGTH // 2]} ... {line[-LENGTH // 2 :]}"


class OneLine:
    """For a parser of jsonargparse, before its class: what is wrong is told in a line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with what is wrong; the parser of a part of a configuration leaves that to the whole's."""
        if not getattr(self, "exit_on_error", True):
            super().error(message, ex)  # type: ignore[misc]
        self._end(complaint(message, self.known_fields(), getattr(self, "prog", FIT), self.chosen_classes()))

    def _end(self, text: str) -> NoReturn:
        sys.stderr.write(f"fedlscl: {one_line(text)}\n")
        sys.exit(MISUSED)

    def known_fields(self) -> list[str]:
        """The fields that are there, by their names on the command line."""
        options: dict[str, Any] = getattr(self, "_option_string_actions", {})
        return [name[2:] for name in options if name.startswith("--")]

    def chosen_classes(self) -> dict[str, type]:
        """The classes that the words name, by field."""
        return {}


def meant(near: Sequence[str], otherwise: str) -> str:
    """The end of a line that refuses a name: those that are close to it, or where else to look."""
    if not near:
        return f"; {otherwise}"
    *others, last = near
    return f"; did you mean {', '.join(others)} or {last}?" if others else f"; did you mean {last}?"


def similar(field: str, known: Sequence[str]) -> list[str]:
    """Up to three fields that may be meant, the likeliest first.

    They are another group's of the same name and those like it as a whole; where there are none, those of a like name.
    """
    last = field.rpartition(".")[2]
    ends: dict[str, list[str]] = {}
    for each in known:
        ends.setdefault(each.rpartition(".")[2], []).append(each)
    near = [*ends.get(last, []), *get_close_matches(field, known, 3, 0.8)]
    near = near or [each for end in get_close_matches(last, ends, 3, 0.8) for each in ends[end]]
    return list(dict.fromkeys(near))[:3]


def complaint(
    message: str, known: list[str] | None = None, command: str = FIT, classes: Mapping[str, type] | None = None
) -> str:
    """The one sentence that matters of what jsonargparse says.

    Args:
        message: its message, of many lines.
        known: names of fields, to suggest one of.
        command: whose words they are.
        classes: those chosen for fields, whose own fields the help shows.
    """
    field = ""
    for key in re.findall(r'Parser key "([\w.]+)"', message):
        inner = key.removeprefix(f"{field}.").replace(".init_args", "")
        field = f"{field}.{inner}" if field and not key.startswith(f"{field}.") and key != field else key
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    lines = [re.sub(r'^Parser key "[\w.]+": ', "", line) for line in lines if line and not _NOISE.match(line)]
    given = re.search(r"Given value: (.*)", message)
    expected = [match for line in lines if (match := _EXPECTED.match(line))]
    others = [line for line in lines if not _EXPECTED.match(line)]
    field = "seed_everything" if field == "data.seed" else field  # which gets it from there
    where = f"{field}: " if field else ""
    if unknown := _UNKNOWN.search(message):
        name = unknown[unknown.lastindex or 0].lstrip("-").partition("=")[0]
        name = ".".join(part for part in (unknown["group"] or field, name) if part) if not unknown["word"] else name
        kind = (classes or {}).get(field)
        ask = f"--{field}.help {kind.__name__}" if kind else "--help all"
        ask = f"`{command} {ask if command == FIT else '--help'}` lists all"
        return f"there is no field {name}{meant(similar(name, known or []), ask)}"
    if "object has no attribute 'keys'" in message or "is not iterable" in message:
        return f"{field or 'a field'} has a value of another kind, such as a number in the place of several fields"
    if subclass := re.search(r"Not a valid subclass of (\w+)(?:\. Got value: (.*))?", message):
        value = subclass[2] or (given[1] if given else "of another kind")
        return f"{field} is {value}, must be the name of a class, or class_path and init_args, of a {subclass[1]}"
    if expected and not others:
        told = [match for match in expected if match[2] is not None] or expected
        value = told[0][2] if told[0][2] is not None else given[1] if given else "of another kind"
        value = {"None": "null", "True": "true", "False": "false"}.get(value, value)
        return f"{field or 'a value'} is {value}, must be {' or '.join(dict.fromkeys(_type(m[1]) for m in told))}"
    return where + (others[0] if others else message)


def _type(name: str) -> str:
    """What jsonargparse calls a type, in words."""
    if choices := re.match(r"typing\.Literal\[(.*)\]", name):
        return f"one of {choices[1]}"
    short = re.sub(r"<class '(?:.*\.)?(\w+)'>", r"\1", name)
    return _TYPES.get(short, short)


def told(error: BaseException) -> str | None:
    """What is the matter, in a line; None if nobody has foreseen it."""
    names = {kind.__name__ for kind in type(error).__mro__}
    text = str(error)
    if isinstance(error, json.JSONDecodeError):
        return f"a file is not JSON: {text}"
    if isinstance(error, UnicodeDecodeError):
        return f"a file is not text in UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
    if "YAMLError" in names:
        return f"a file is not YAML: {text}"
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error.__cause__, OSError) and text == str(error.__cause__):  # what only hands it on
        return _of_system(error.__cause__)
    if "SafetensorError" in names:
        cause = " (is the disk full?)" if "os error 28" in text else ""
        return f"a file of tensors cannot be read or written: {text}{cause}"
    if (
        isinstance(error, MemoryError)
        or "OutOfMemoryError" in names
        or ("allocate memory" in text and not _ours(error))
    ):
        return f"there is not enough memory: {text or 'smaller batches or images need less'}"
    if isinstance(error, OverflowError):
        return f"a number is too large: {text}"
    if isinstance(error, ValueError) or "MisconfigurationException" in names:
        return complaint(text) if "Union subtypes" in text or "Parser key" in text else text
    if isinstance(error, RuntimeError | LookupError | ImportError | ArithmeticError) and _ours(error):
        return text.strip("'\"") if isinstance(error, KeyError) else text
    return None


def _of_system(error: OSError) -> str:
    """What the system says, with the file that it is about."""
    if error.strerror is None:
        return str(error)
    files = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    remedy = "; make room and start again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"{' and '.join(files)}: {error.strerror}{remedy}" if files else f"{error.strerror}{remedy}"


def _ours(error: BaseException) -> bool:
    """Whether a line of this package has raised it, in words of its own."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    # what Python raises in a line of this package, for a key that is not there, says nothing to a user
    return bool(
        last
        and Path(last.filename).is_relative_to(Path(__file__).parents[1])
        and (last.line or "").startswith("raise ")
    )


@contextmanager
def kept_in(folder: Path) -> Iterator[None]:
    """Keep the tracebacks of what goes wrong inside in this folder, and show in a line what is warned of."""
    log, shown = logging.getLogger("fedlscl"), _Shown(folder / TRACEBACK)
    log.addHandler(shown)
    try:
        yield
    except Exception as error:
        error.__dict__["kept_in"] = folder
        raise
    finally:
        log.removeHandler(shown)


class _Shown(logging.Handler):
    """Shows warnings in a line each; if there are tracebacks, it adds them to a file.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(logging.WARNING)
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        """Show a warning."""
        error = record.exc_info[1] if record.exc_info else None
        text = one_line(f"{record.getMessage()}: {type(error).__name__}: {error}" if error else record.getMessage())
        if error and not _ours(error):
            with suppress(OSError), self.path.open("a", encoding="utf-8", errors="replace") as file:
                file.write("".join(traceback.format_exception(error)) + "\n")
                text += f"; the traceback is in {self.path}"
        sys.stderr.write(f"{text}\n")


@contextmanager
def in_a_line() -> Iterator[None]:
    """Let whatever goes wrong inside end the process with a line and a code, never with a traceback."""
    noted: list[int] = []  # an import in whose middle Ctrl-C comes may end in any error

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        signal.default_int_handler(number, frame)

    ours = threading.current_thread() is threading.main_thread()
    ours = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield
        sys.stdout.flush()  # what the reader of a pipe does not want is noticed here, and not at Python's very end
    except BrokenPipeError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain when it ends
        sys.exit(UNHEARD)
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as end:
        if noted or _of_interrupt(end):  # Lightning's answer to Ctrl-C
            _interrupted()
        raise
    except Exception as error:
        if noted or _of_interrupt(error):
            _interrupted()
        if (text := told(error)) is not None:
            sys.exit(f"fedlscl: {one_line(text) or type(error).__name__}")
        sys.stderr.write(f"fedlscl: {_unforeseen(error)}\n")
        sys.exit(UNEXPECTED)
    finally:
        if ours and signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _of_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an exception."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _interrupted() -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would come in the middle of tidying up
    sys.stderr.write("fedlscl: interrupted; the same command goes on with a run from its last complete round\n")
    sys.exit(INTERRUPTED)


def _unforeseen(error: Exception) -> str:
    """Keep the traceback in a file; what is said of it."""
    text = "".join(traceback.format_exception(error))
    what = one_line(f"unexpected {type(error).__name__}: {error}").rstrip(": ")
    folder: Path | None = error.__dict__.get("kept_in")
    if folder is not None and folder.is_dir():
        with suppress(OSError):
            (folder / TRACEBACK).write_text(text, encoding="utf-8", errors="replace")
            return f"{what}; the traceback is in {folder / TRACEBACK}"
    with suppress(OSError):
        # readable for nobody else, and under a name that nobody can have taken before
        with tempfile.NamedTemporaryFile("w", prefix="fedlscl-", suffix=".txt", delete=False, encoding="utf-8") as file:
            file.write(text.encode(errors="replace").decode())
        return f"{what}; the traceback is in {file.name}"
    return f"{what}; its traceback cannot be kept anywhere:\n{text}"


def printable(*streams: TextIO) -> None:
    """Let names of files be printed as they are, whatever their bytes, and signs that a terminal lacks as `?`."""
    codecs.register_error("fedlscl", _encode)
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # of a file that was put in its place
                stream.reconfigure(errors="fedlscl")


def _encode(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)  # the streams are written to
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("replace")(error)
