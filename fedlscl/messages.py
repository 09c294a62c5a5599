"""What crosses the boundary between clients and server: named tensors in the safetensors format, and nothing else.

A message is checked against a schema before its tensors are built, so that a damaged or hostile one is refused by
name and never reaches the aggregation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LARGEST = 1e15  # of a tensor's values: what is computed of them must not overflow float32
_HEADER_LIMIT = 2**20  # bytes; names, shapes and offsets of the largest CNN take a tenth of it
MOST_SAID = 500  # characters of a line that a stranger may have had a part in

Rule = Callable[[Tensor], str | None]
"""What is wrong with a tensor's values by the method's own rules, in words that follow its name, or None."""


class MessageError(ValueError):
    """A message that does not fit its schema; the text names the tensor and what was wrong."""


def in_a_line(text: object) -> str:
    """What somebody else may have written, fit for a log: one line of `MOST_SAID` characters, none unprintable."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:MOST_SAID])


def unit_rows(tensor: Tensor) -> str | None:
    """Rows (n, d) that are normalised have length 1; or 0, where there was nothing to normalise."""
    lengths = tensor.double().norm(dim=1)
    wrong = ((lengths - 1).abs() > 1e-3) & (lengths > 0)
    return f"has a row of length {float(lengths[wrong][0]):g}, must be 1" if bool(wrong.any()) else None


def not_negative(tensor: Tensor) -> str | None:
    """Variances, sums of squares and counts are 0 or more; counts are at most `LARGEST`, so that they can be added."""
    if bool((tensor < 0).any()):
        return f"holds {tensor.min():g}, must not be negative"
    return f"holds {tensor.max():g}, must be at most {LARGEST:g}" if bool((tensor > LARGEST).any()) else None


def semidefinite(tensor: Tensor) -> str | None:
    """Sums of x x^T (d, d) are symmetric and positive semi-definite, up to the rounding of float32."""
    matrix = tensor.double()
    size = float(matrix.abs().max())
    if float((matrix - matrix.mT).abs().max()) > 1e-4 * size:
        return "is not symmetric"
    shifted = matrix + 1e-4 * size * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    if int(torch.linalg.cholesky_ex(shifted).info) == 0:  # a tenth of the time that eigenvalues take
        return None
    lowest = float(torch.linalg.eigvalsh(matrix)[0])
    return f"has the eigenvalue {lowest:g}, must not be negative" if lowest < -1e-4 * size else None


@dataclass(frozen=True)
class AtMost:
    """A dimension whose size the sender chooses, between 1 and `limit`."""

    limit: int


@dataclass(frozen=True)
class TensorSpec:
    """What one tensor of a message must look like; an optional one may be missing.

    Its values may have to keep a rule besides, such as `unit_rows`, `not_negative` or `semidefinite`.
    """

    shape: tuple[int | AtMost, ...]
    dtype: torch.dtype = torch.float32
    optional: bool = False
    rule: Rule | None = None

    @classmethod
    def like(cls, tensor: Tensor) -> TensorSpec:
        """The specification that exactly this shape and dtype fulfil."""
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def largest(self) -> tuple[int, ...]:
        """Shape of the largest tensor that fits."""
        return tuple(size.limit if isinstance(size, AtMost) else size for size in self.shape)

    @property
    def max_bytes(self) -> int:
        """Size of the largest tensor that fits, in bytes."""
        return math.prod(self.largest) * self.dtype.itemsize

    def problem(self, shape: tuple[int, ...], dtype: torch.dtype | None) -> str | None:
        """Why a tensor of this shape and dtype is not acceptable, or None."""
        if dtype != self.dtype:
            return f"has dtype {dtype}, expected {self.dtype}"
        fits = len(shape) == len(self.shape) and all(
            1 <= size <= want.limit if isinstance(want, AtMost) else size == want
            for size, want in zip(shape, self.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join(f"1..{s.limit}" if isinstance(s, AtMost) else str(s) for s in self.shape)
            return f"has shape {shape}, expected ({wanted})"
        return None


Schema = Mapping[str, TensorSpec]


_RULES: Mapping[str, Rule] = {"running_var": not_negative, "num_batches_tracked": not_negative}
"""Of what torch's batch normalisation keeps, by the last part of its name."""


def schema_of(tensors: Mapping[str, Tensor]) -> Schema:
    """The schema that tensors of exactly these names, shapes and dtypes fulfil; variances and counters not negative."""
    return {n: replace(TensorSpec.like(tensor), rule=_RULES.get(n.rpartition(".")[2])) for n, tensor in tensors.items()}


def unusable(tensors: Mapping[str, Tensor], schema: Schema) -> str | None:
    """What is wrong with the values of tensors that have the shapes and dtypes of a schema, or None.

    Floating-point numbers must be finite and at most `LARGEST`, bytes of truth values 0 or 1, and rules are kept.
    """
    for name, tensor in tensors.items():
        # NaN is the largest of all, and no more at most `LARGEST` than infinity is
        if tensor.is_floating_point() and tensor.numel() and not float(tensor.abs().max()) <= LARGEST:
            return f"tensor '{name}' holds NaN or infinite values, or some beyond {LARGEST:g}"
        if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
            return f"tensor '{name}' holds bytes that are neither true nor false"
        if (rule := schema[name].rule) is not None and (problem := rule(tensor)) is not None:
            return f"tensor '{name}' {problem}"
    return None


def optional(schema: Schema) -> Schema:
    """The schema of which every tensor may be missing."""
    return {name: replace(spec, optional=True) for name, spec in schema.items()}


@dataclass(frozen=True)
class Message:
    """Named tensors of one client in one round.

    `samples` is the number of training images behind the message (the weight of the client in an average).
    """

    client: int
    task: int
    round: int
    samples: int
    tensors: Mapping[str, Tensor]

    kind: ClassVar[str] = "message"
    _numbers: ClassVar[tuple[str, ...]] = ("client", "task", "round", "samples")

    def to_bytes(self) -> bytes:
        """The message as it travels: safetensors, with the four numbers in its metadata."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        data = save(tensors)
        start = 8 + int.from_bytes(data[:8], "little")
        numbers = {key: str(getattr(self, key)) for key in self._numbers}
        # put into the header here because safetensors writes metadata in random order: equal messages are equal bytes
        header = json.dumps({"__metadata__": numbers, **json.loads(data[8:start])}).encode()
        header += b" " * (-len(header) % 8)
        return len(header).to_bytes(8, "little") + header + data[start:]

    @classmethod
    def from_bytes(cls, data: bytes, schema: Schema) -> Self:
        """Read a message and check it against `schema`.

        Raises:
            MessageError: too large, truncated, not safetensors, a missing or unknown tensor, a wrong shape or dtype,
                a value that is not finite or beyond `LARGEST`, or one that breaks the tensor's rule.
        """
        limit = _HEADER_LIMIT + sum(spec.max_bytes for spec in schema.values())
        if len(data) > limit:
            raise MessageError(f"{cls.kind} has {len(data)} bytes, at most {limit} fit its schema")
        header = _header(data, cls.kind)
        metadata = header.pop("__metadata__", None)
        missing = sorted(name for name, spec in schema.items() if not (spec.optional or name in header))
        if missing or not set(header) <= set(schema):
            unknown = sorted(set(header) - set(schema))
            named = f"{cls.kind} lacks tensors {_some(missing)} and has unknown tensors {_some(unknown)}"
            raise MessageError(in_a_line(named))
        for name, entry in header.items():
            shape = entry.get("shape") if isinstance(entry, dict) else None
            if not isinstance(entry, dict) or not isinstance(shape, list) or any(type(n) is not int for n in shape):
                raise MessageError(f"{cls.kind}: tensor '{name}' has a damaged header")
            problem = schema[name].problem(tuple(shape), _DTYPES.get(str(entry.get("dtype"))))
            if problem:
                raise MessageError(f"{cls.kind}: tensor '{name}' {problem}")
        try:
            tensors = load(data)
        except SafetensorError as error:
            raise MessageError(in_a_line(f"{cls.kind} is damaged: {error}")) from error
        if problem := unusable(tensors, schema):
            raise MessageError(f"{cls.kind}: {problem}")
        return cls(**_read_numbers(metadata, cls._numbers, cls.kind), tensors=tensors)


class Upload(Message):
    """What a client sends to the server after its round."""

    kind = "upload"


class Received(Mapping[int, Upload]):
    """The valid uploads of one round by client, on the disk: each is read when it is asked for."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[Upload, Path]] = {}

    def add(self, upload: Upload, file: Path) -> None:
        """Take in an upload that was checked, and let go of its tensors, which `file` holds."""
        self._found[upload.client] = replace(upload, tensors={}), file

    def leave_out(self, client: int) -> None:
        """Forget a client's upload."""
        del self._found[client]

    def __getitem__(self, client: int) -> Upload:
        """Read a client's upload."""
        upload, file = self._found[client]
        return replace(upload, tensors=load_file(file))

    def __iter__(self) -> Iterator[int]:
        """All clients that sent one, ascending, in whatever order they did: sums depend on it in the last bit."""
        return iter(sorted(self._found))

    def __len__(self) -> int:
        """How many they are."""
        return len(self._found)


class Download(Message):
    """What the server sends to one client."""

    kind = "download"


def _some(names: list[str], most: int = 3) -> str:
    """Names as a list in brackets, the first few of many."""
    cut = [name[:40] for name in names[:most]]
    return f"{cut}" if len(names) <= most else f"{cut} and {len(names) - most} more"


def _header(data: bytes, kind: str) -> dict[str, object]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, _HEADER_LIMIT):
        raise MessageError(f"{kind} is truncated or not in the safetensors format ({len(data)} bytes)")
    try:
        header = json.loads(data[8 : 8 + length], object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"{kind} has an unreadable header") from error
    if not isinstance(header, dict):
        raise MessageError(f"{kind} has an unreadable header")
    return header


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) < len(pairs):  # two parsers could disagree on which one counts
        raise ValueError("a name occurs twice")
    return entries


def _read_numbers(metadata: object, names: tuple[str, ...], kind: str) -> dict[str, int]:
    numbers = {}
    for name in names:
        text = metadata.get(name) if isinstance(metadata, dict) else None
        if not isinstance(text, str) or not (text.isascii() and text.isdecimal()) or len(text) > 18:
            found = repr(text)[:40]
            raise MessageError(f"{kind} has no valid number '{name}' (found {found})")
        numbers[name] = int(text)
    return numbers
