"""What secure sums cost, and whether they change a number.

    python experiments/secure.py cost [--values N] [--clients 5 50 500]
    python experiments/secure.py parity FOLDER [--methods NAME ...] [--seeds 42 1999] [--engines simulated deployed]
        [--bits N] [-- fields of `fedlscl fit`]

`cost` adds up vectors of random numbers, all clients and the server in this process, without any training; with some
clients dropping out between sharing their secrets and sending their values. Seconds are of CPU time, of one thread.
`parity` runs methods on the digits with and without, by default all that allow it, and compares every accuracy; with
engines it does the same run with secure sums on Flower too, whose numbers must be equal to the last bit. What is
finished in the folder is not run again. The table goes to the standard output, the same to FOLDER/parity.json.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from secure_parity import ENGINES, HEAD, allowed, parity, row
from torch import Tensor

from fedlscl.federation.secure.fixed_point import BITS
from fedlscl.federation.secure.party import Party
from fedlscl.federation.secure.session import Session
from fedlscl.federation.secure.words import ADVERTISE, MASK, SHARE, UNMASK
from fedlscl.messages import Upload, schema_of
from fedlscl.schedule import Round, Schedule

ROUND = Round(1, 1, True, 0)
DROPPED = (0.0, 0.1, 0.3)


class Meter:
    """Seconds and bytes, by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"client": 0.0, "server": 0.0}
        self.up, self.down = Counter[int](), Counter[int]()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the CPU time inside."""
        before = time.process_time()
        yield
        self.seconds[name] += time.process_time() - before


State = dict[str, NDArray[Any]]


class Work(NamedTuple):
    """A step of one client."""

    step: str
    client: int
    state: State
    message: bytes
    values: int


def tensors(client: int, values: int) -> dict[str, Tensor]:
    """What a client adds to the sum."""
    return {"values": torch.randn(values, generator=torch.Generator().manual_seed(client))}


def done(work: Work) -> tuple[bytes, State, float]:
    """The reply, the client's state after it, and its seconds of CPU time."""
    state = {name: torch.from_numpy(array) for name, array in work.state.items()}
    party = Party.restored(work.client, ROUND, state) if state else Party(work.client, ROUND)
    added = tensors(work.client, work.values)
    before = time.process_time()
    reply = party.mask(work.message, added) if work.step == MASK else party.reply(work.step, work.message)
    seconds = time.process_time() - before
    return reply, {name: tensor.numpy() for name, tensor in party.state().items()}, seconds


def cost(clients: int, values: int, jobs: int) -> Iterator[str]:
    """Rows of a table: one for each part of the clients that drops out."""
    plain = Meter()
    total = torch.zeros(values, dtype=torch.float64)
    for client in range(clients):
        upload = Upload(client, 1, 1, 1, tensors(client, values))
        with plain.timed("client"):
            message = upload.to_bytes()
        with plain.timed("server"):
            total += Upload.from_bytes(message, schema_of(upload.tensors)).tensors["values"].double()

    least, meter = Schedule(1, secure=True).least(clients), Meter()
    session = Session(range(clients), ROUND, least, [BITS], {"values": torch.Size((values,))})
    states: dict[int, State] = {client: {} for client in range(clients)}

    def step(
        name: str, meter: Meter, messages: Callable[[], Mapping[int, bytes]], take: Callable[[int, bytes], None]
    ) -> dict[int, State]:
        after: dict[int, State] = {}
        with meter.timed("server"):
            asked = messages()
        works = [Work(name, client, states[client], message, values) for client, message in asked.items()]
        replies = pool.imap(done, works, 4)
        for work, (reply, state, seconds) in zip(works, replies, strict=True):
            meter.seconds["client"] += seconds
            meter.down[work.client] += len(work.message)
            meter.up[work.client] += len(reply)
            after[work.client] = state
            with meter.timed("server"):
                take(work.client, reply)
        return after

    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        states = step(ADVERTISE, meter, session.invitations, session.advertised)
        states = step(SHARE, meter, session.rosters, session.shared)
        sent: dict[int, bytes] = {}
        states = step(MASK, meter, session.deliveries, sent.__setitem__)
        for part in DROPPED:
            now, used, seen = copy.deepcopy(session), copy.deepcopy(meter), round((1 - part) * clients)
            exact = torch.zeros(values, dtype=torch.float64)
            for client in range(seen):
                exact += tensors(client, values)["values"].double()
                with used.timed("server"):
                    now.masked(client, sent[client])
            step(UNMASK, used, now.requests, now.revealed)
            with used.timed("server"):
                found = now.total()["values"]
            error = float((found - exact).abs().max())
            up, down = (sum(of[client] for client in range(seen)) / seen for of in (used.up, used.down))
            one, other = used.seconds, plain.seconds
            yield (
                f"| {clients} | {clients - seen} | {values:,} | {up:,.0f} | {up / len(message):.2f} | {down:,.0f} | "
                f"{one['client'] / clients:.3g} | {other['client'] / clients:.2g} | "
                f"{one['server']:.3g} | {other['server']:.2g} | {error:.1e} |"
            )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    costs = parts.add_parser("cost")
    costs.add_argument("--values", type=int, default=104_066, help="by default those of fed_lscl_sums on the digits")
    costs.add_argument("--clients", type=int, nargs="+", default=[5, 50, 500])
    costs.add_argument("--jobs", type=int, default=1, help="processes for the clients")
    parities = parts.add_parser("parity")
    parities.add_argument("folder", type=Path)
    parities.add_argument("--methods", nargs="+", help="by default all that allow it")
    parities.add_argument("--seeds", type=int, nargs="+", default=[42])
    parities.add_argument("--engines", nargs="*", choices=ENGINES, default=[], help="beside this process")
    parities.add_argument("--bits", type=int, help="federation.fraction_bits of the secure sums, if not by default")
    words = [*sys.argv[1:], "--"]
    at = words.index("--")
    given, fields = parser.parse_args(words[:at]), words[at + 1 : -1]
    torch.set_num_threads(1)
    if given.part == "cost":
        columns = ("clients", "drop out", "values", "bytes up", "x plain", "bytes down", "s a client", "plain")
        print(f"| {' | '.join(columns)} | s of the server | plain | error |\n{'| --- ' * 11}|")
        for clients in given.clients:
            for line in cost(clients, given.values, given.jobs):
                print(line, flush=True)
    else:
        print(f"| {' | '.join(HEAD)} |\n{'| --- ' * len(HEAD)}|")
        different = False
        for found in parity(
            given.folder.resolve(), given.methods or [*allowed()], given.seeds, given.engines, fields, given.bits
        ):
            print(row(found), flush=True)
            different |= not all(equal for entry in found for equal in entry["engines"].values())
        if different:
            sys.exit("the engines differ")


if __name__ == "__main__":
    main()
