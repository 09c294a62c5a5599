"""Flower's apps in processes that begin as a copy of one which has imported everything.

Flower starts a process for each message to a client, which spends nearly all of its seconds on imports. Commands of the
same names, which stand before Flower's own in PATH, have another process forked in the place of that, which has done
the imports and nothing else: so an app finds nothing in memory that another has left there.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path

COMMANDS = ("flwr-clientapp", "flwr-serverapp", "flwr-simulation")
ASK = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as to:
    to.connect({address!r})
    words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
    socket.send_fds(to, [b" "], [1, 2])
    to.sendall(json.dumps([words, os.getcwd(), os.umask(0o077), dict(os.environ)]).encode())
    to.shutdown(socket.SHUT_WR)
    sys.exit(int(to.recv(9) or 1))
"""


@contextmanager
def commands(folder: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """Put these commands into a folder; they work until the end."""
    address = str(folder / "socket")
    for name in COMMANDS:
        path = folder / name
        path.write_text(ASK.format(python=sys.executable, address=address))
        path.chmod(0o700)
    with socket.socket(socket.AF_UNIX) as asked:
        asked.bind(address)
        asked.listen()  # whoever asks before all is imported waits
        words = [sys.executable, __file__, str(asked.fileno())]
        with subprocess.Popen(words, env=dict(environment), pass_fds=[asked.fileno()]) as process:
            try:
                yield
            finally:
                process.kill()


def serve(number: int) -> None:
    """Import everything, and fork for each command that a socket hears of."""
    with socket.socket(fileno=number) as asked:
        mains = {point.name: point.load() for point in entry_points(group="console_scripts") if point.name in COMMANDS}
        import timm  # noqa: F401  # as a model is built

        import fedlscl.deployment.flower.client
        import fedlscl.deployment.flower.server  # noqa: F401

        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for children
        while True:
            by, _ = asked.accept()
            if not os.fork():
                break
            by.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, outputs, _, _ = socket.recv_fds(by, 1, 2)
    with by.makefile("rb") as file:
        sys.argv, folder, mask, environment = json.load(file)
    for output, number in zip(outputs, (1, 2), strict=True):
        os.dup2(output, number)
    os.chdir(folder)
    os.umask(mask)
    os.environ.clear()
    os.environ.update(environment)
    status = 1
    try:
        mains[sys.argv[0]]()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        by.sendall(str(status).encode())
        os._exit(status)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
