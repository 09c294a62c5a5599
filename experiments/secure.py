"""What secure sums cost, and whether they change a number.

    python experiments/secure.py cost [--values N] [--clients 5 50 500]
    python experiments/secure.py parity FOLDER --methods fed_ridge fedavg --seeds 42 1999 [-- fields of `fedlscl fit`]

`cost` adds up vectors of random numbers, all clients and the server in this process, without any training; with some
clients dropping out between sharing their secrets and sending their values. Seconds are of CPU time, of one thread.
`parity` runs methods with and without, and compares every accuracy.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlscl.cli import main as fedlscl
from fedlscl.federation.secure.party import Party
from fedlscl.federation.secure.session import Session
from fedlscl.messages import Upload, schema_of
from fedlscl.schedule import Round, Schedule

HERE = Path(__file__).resolve().parent
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


def cost(clients: int, values: int) -> Iterator[str]:
    """Rows of a table: one for each part of the clients that drops out."""
    least, shapes = Schedule(1, secure=True).least(clients), {"values": torch.Size((values,))}

    def tensors(client: int) -> dict[str, Tensor]:
        return {"values": torch.randn(values, generator=torch.Generator().manual_seed(client))}

    plain = Meter()
    total = torch.zeros(values, dtype=torch.float64)
    for client in range(clients):
        upload = Upload(client, 1, 1, 1, tensors(client))
        with plain.timed("client"):
            message = upload.to_bytes()
        with plain.timed("server"):
            total += Upload.from_bytes(message, schema_of(upload.tensors)).tensors["values"].double()

    meter, session = Meter(), Session(range(clients), ROUND, least, 30, shapes)
    parties = {client: Party(client, ROUND) for client in range(clients)}

    def step(
        meter: Meter,
        messages: Callable[[], Mapping[int, bytes]],
        answer: Callable[[int, bytes], bytes],
        take: Callable[[int, bytes], None],
    ) -> None:
        with meter.timed("server"):
            asked = messages()
        for client, message in asked.items():
            meter.down[client] += len(message)
            with meter.timed("client"):
                reply = answer(client, message)
            meter.up[client] += len(reply)
            with meter.timed("server"):
                take(client, reply)

    step(meter, session.invitations, lambda c, m: parties[c].advertise(m), session.advertised)
    step(meter, session.rosters, lambda c, m: parties[c].share(m), session.shared)
    sent: dict[int, bytes] = {}
    step(meter, session.deliveries, lambda c, m: parties[c].mask(m, tensors(c)), sent.__setitem__)
    for part in DROPPED:
        now, of_server, seen = copy.deepcopy(session), copy.deepcopy(meter), round((1 - part) * clients)
        helping = {client: Party.restored(client, ROUND, parties[client].state()) for client in range(seen)}
        with of_server.timed("server"):
            for client in range(seen):
                now.masked(client, sent[client])
        step(of_server, now.requests, partial(unmasked, helping), now.revealed)
        with of_server.timed("server"):
            found = now.total()["values"]
        exact = torch.stack([tensors(client)["values"].double() for client in range(seen)]).sum(0)
        error = float((found - exact).abs().max())
        up, down = (sum(of[client] for client in range(seen)) / seen for of in (of_server.up, of_server.down))
        one, other = of_server.seconds, plain.seconds
        yield (
            f"| {clients} | {clients - seen} | {values:,} | {up:,.0f} | {up / len(message):.2f} | {down:,.0f} | "
            f"{one['client'] / clients:.3g} | {other['client'] / clients:.2g} | "
            f"{one['server']:.3g} | {other['server']:.2g} | {error:.1e} |"
        )


def unmasked(parties: Mapping[int, Party], client: int, message: bytes) -> bytes:
    """A client's last reply."""
    return parties[client].unmask(message)


def parity(folder: Path, methods: list[str], seeds: list[int], fields: list[str]) -> Iterator[str]:
    """Rows of a table: one for each method and seed."""
    for method in methods:
        for seed in seeds:
            found = []
            for secure in ("plain", "secure"):
                run_dir = folder / f"{method}-{seed}-{secure}"
                words = [f"--config={HERE / 'digits.yaml'}", f"--config={HERE / 'methods' / f'{method}.yaml'}", *fields]
                words += [f"--seed_everything={seed}", "--tracking.wandb_mode=disabled", f"--run_dir={run_dir}"]
                words += ["--federation.secure=true"] if secure == "secure" else []
                with redirect_stdout(io.StringIO()):
                    fedlscl(["fit", *words])
                found.append(json.loads((run_dir / "summary.json").read_text()))
            yield row(method, seed, *found)


def row(method: str, seed: int, plain: dict[str, Any], secure: dict[str, Any]) -> str:
    """Final averages under `seen`, the largest difference of any accuracy, and the bytes of both."""
    values = [summary["accuracy"]["seen"]["final_average"] for summary in (plain, secure)]
    apart = max(
        abs(a - b)
        for mask, of in plain["accuracy"].items()
        for a, b in zip(flat(of["matrix"]), flat(secure["accuracy"][mask]["matrix"]), strict=True)
    )
    sizes = [summary["bytes_up"]["total"] for summary in (plain, secure)]
    return (
        f"| {method} | {seed} | {values[0]:.4f} | {values[1]:.4f} | {apart:.4f} | {sizes[0]:,} | {sizes[1]:,} | "
        f"{sizes[1] / sizes[0]:.2f} |"
    )


def flat(matrix: Any) -> Iterator[float]:
    """The numbers in lists of lists, without those that are missing."""
    for entry in matrix:
        if isinstance(entry, list):
            yield from flat(entry)
        elif entry is not None and entry == entry:
            yield entry


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    costs = parts.add_parser("cost")
    costs.add_argument("--values", type=int, default=104_066, help="by default those of fed_lscl_sums on the digits")
    costs.add_argument("--clients", type=int, nargs="+", default=[5, 50, 500])
    parities = parts.add_parser("parity")
    parities.add_argument("folder", type=Path)
    parities.add_argument("--methods", nargs="+", required=True)
    parities.add_argument("--seeds", type=int, nargs="+", default=[42])
    words = [*sys.argv[1:], "--"]
    at = words.index("--")
    given, fields = parser.parse_args(words[:at]), words[at + 1 : -1]
    torch.set_num_threads(1)
    if given.part == "cost":
        columns = ("clients", "drop out", "values", "bytes up", "x plain", "bytes down", "s a client", "plain")
        print(f"| {' | '.join(columns)} | s of the server | plain | error |\n{'| --- ' * 11}|")
        for clients in given.clients:
            for line in cost(clients, given.values):
                print(line, flush=True)
    else:
        print("| method | seed | plain | secure | largest difference | bytes up, plain | secure | ratio |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for line in parity(given.folder.resolve(), given.methods, given.seeds, fields):
            print(line, flush=True)


if __name__ == "__main__":
    main()
