"""Messages of several methods, damaged at random: nothing but MessageError may come out, in bounded time and memory."""

from __future__ import annotations

import json
import random
import resource
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fedlscl.federation.algorithm import Federation
from fedlscl.messages import Download, MessageError, Schema, Upload
from fedlscl.schedule import Round
from fedlscl.server import Server
from reliability.small import Hostile, experiment, federation, quiet

COUNT = 10_000
METHODS = ("fed_lscl", "fed_lscl_sums", "fedavg", "fedweit", "pilora", "lorm", "glfc", "mfcl", "fedvit_rows")
SLOWEST = 2.0  # seconds that one message may take, where other work shares the cores
GROWTH = 256.0  # MiB by which the process may grow


class Sample(NamedTuple):
    """A message as it should be, and what it must fit."""

    method: str
    kind: type[Upload | Download]
    data: bytes
    schema: Schema
    server: Server


class Listening(Hostile):
    """A transport that keeps what client 1 sends and is answered."""

    def __init__(self, federation: Federation) -> None:
        self.kept: list[tuple[type[Upload | Download], bytes]] = []

        def note(upload: Upload, _: object) -> Upload:
            self.kept.append((Upload, upload.to_bytes()))
            return upload

        super().__init__(federation, 1, note)

    def answer(self, round: Round, client: int, message: bytes | None, accepted: bool) -> None:
        """Keep it."""
        if client == self.client and message is not None:
            self.kept.append((Download, message))
        super().answer(round, client, message, accepted)


def samples(folder: Path) -> list[Sample]:
    """Every method's uploads and downloads of a run."""
    found = []
    for name in METHODS:
        made = federation(experiment(name, folder), folder / name)
        made.transport = listening = Listening(made)
        for _ in made.run():
            pass
        body = made.template.model_of(1)
        for kind, data in listening.kept:
            schema = body.upload_schema() if kind is Upload else body.download_schema()
            found.append(Sample(name, kind, data, schema, made.server))
    return found


# ---- what may happen to bytes


def flip(data: bytes, rng: random.Random) -> bytes:
    """A few bits turned, the header's more often."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        end = min(len(data), 2000) if rng.random() < 0.5 else len(data)
        changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    """Cut off, or a piece taken out."""
    start = rng.randrange(len(data))
    return data[:start] if rng.random() < 0.5 else data[:start] + data[start + rng.randrange(1, 4096) :]


def longer(data: bytes, rng: random.Random) -> bytes:
    """Something put in."""
    start = rng.randrange(len(data))
    return data[:start] + rng.randbytes(rng.choice((1, 8, 1000, 100_000))) + data[start:]


def length(data: bytes, rng: random.Random) -> bytes:
    """Another length of the header."""
    value = rng.choice((0, 1, 7, 8, 2**16, 2**20, 2**32, 2**63 - 1, 2**64 - 1, len(data), len(data) - 8))
    return value.to_bytes(8, "little") + data[8:]


def header(data: bytes, rng: random.Random) -> bytes:
    """Another header: shapes, dtypes, offsets, names and numbers that are not right."""
    size = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + size])
    names = [name for name in entries if name != "__metadata__"]
    odd: Any = rng.choice((-1, 0, 2**31, 2**63, 10**30, 1.5, None, True, "1", [], {}, "x" * 50_000, "\x00\n\x1b[31m"))
    what = rng.randrange(9)
    name = rng.choice(names)
    if what == 0:
        entries[name]["shape"] = [odd] * rng.randrange(1, 5)
    elif what == 1:
        entries[name]["dtype"] = rng.choice(("F64", "F16", "BF16", "I64", "BOOL", "U8", "F8_E4M3", "C64", odd))
    elif what == 2:
        entries[name]["data_offsets"] = rng.choice(([0, odd], [odd, odd], odd, [10**15, 10**16], [8, 0]))
    elif what == 3:
        entries[f"{odd}"[:60_000]] = entries.pop(name)
    elif what == 4:
        entries["__metadata__"] = rng.choice((odd, {"client": odd}, {**entries["__metadata__"], "samples": odd}))
    elif what == 5:
        entries |= {f"more {number}": entries[name] for number in range(rng.choice((1, 100, 3000)))}
    elif what == 6:
        entries[name] = odd
    elif what == 7:
        shape = entries[name].get("shape")
        entries[name]["shape"] = [*reversed(shape)] if shape else [1]
    else:
        key = rng.choice(("client", "task", "round", "samples"))
        entries["__metadata__"][key] = rng.choice(("-1", "1e3", "٣", "1" * 30, " 1", "0x1", ""))
    text = json.dumps(entries).encode()
    if rng.random() < 0.05:
        text = b"[" * 100_000
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def values(data: bytes, rng: random.Random) -> bytes:
    """Numbers that are not finite, far too large, or of another sign, in the right place."""
    start = 8 + int.from_bytes(data[:8], "little")
    changed = bytearray(data)
    if len(data) - start >= 4:
        place = start + 4 * rng.randrange((len(data) - start) // 4)
        changed[place : place + 4] = rng.choice(
            (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff", b"\xff\xff\x7f\x7f", b"\xff\xff\xff\xff")
        )
    return bytes(changed)


def another(data: bytes, rng: random.Random) -> bytes:
    """Something else altogether."""
    return rng.choice((b"", data[:8], rng.randbytes(500), b"\x80\x04\x95" + data, b"PK\x03\x04" + data, data + data))


DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(flip, cut, longer, length, header, header, header, values, another),
)


@quiet()
def run(folder: Path, seed: int, count: int) -> tuple[str, int]:
    """Damage `count` messages; what came of it, and how many faults there were."""
    rng, good = random.Random(seed), samples(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ended, slowest, longest, faults = Counter[str](), (0.0, ""), 0, list[str]()
    for number in range(count):
        sample, damage = good[number % len(good)], rng.choice(DAMAGES)
        data = damage(sample.data, rng)
        case = f"{damage.__name__} of {sample.method}, {sample.kind.kind} {number}"
        since = time.perf_counter()
        try:
            message = sample.kind.from_bytes(data, sample.schema)
            if isinstance(message, Upload):
                sample.server.check(message)
            ended["accepted"] += 1
        except MessageError as error:
            ended["refused"] += 1
            longest = max(longest, len(str(error)))
        except Exception as error:
            faults.append(f"{case}: {type(error).__name__}: {str(error)[:200]}")
        slowest = max(slowest, (time.perf_counter() - since, case))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if slowest[0] > SLOWEST:
        faults.append(f"{slowest[1]} took {slowest[0]:.1f} s")
    if grown > GROWTH:
        faults.append(f"the process grew by {grown:.0f} MiB")
    largest = max(len(sample.data) for sample in good) / 1e6
    lines = [
        f"{count} messages of {len(METHODS)} methods ({', '.join(METHODS)}), up to {largest:.2f} MB: "
        f"{ended['refused']} refused with MessageError, {ended['accepted']} accepted (what was left fits), "
        f"{len(faults)} faults. The slowest took {1000 * slowest[0]:.0f} ms ({slowest[1]}), the longest error had "
        f"{longest} characters, and the process grew by {grown:.0f} MiB.",
        "",
        *(f"- FAULT {fault}" for fault in faults),
    ]
    return "\n".join(lines), len(faults)
