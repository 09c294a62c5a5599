"""Start Flower's SuperLink or SuperNode with files that nobody else may read; a node that is refused tries again.

    python -m fedlscl.deployment.flower.start flower-superlink --database superlink.db ...
    python -m fedlscl.deployment.flower.start flower-supernode --superlink ...

A SuperLink takes a node that was killed for one that is there until it has missed its heartbeats for a minute, and
refuses until then whoever starts with the same key: SuperNode ends with 305. It is started again after 5, 10, 20, 40
and 80 seconds, and no more after that.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

DELAYS = (5.0, 10.0, 20.0, 40.0, 80.0)  # seconds
REFUSED = "Exit Code: 305"


def private(words: Sequence[str]) -> None:
    """Let nobody else read what this process and its children write, nor a data base that is there."""
    os.umask(0o077)
    for word, behind in zip(words, [*words[1:], ""], strict=True):
        if word == "--database" or word.startswith("--database="):
            path = Path(word.partition("=")[2] or behind)
            if path.is_file():
                path.chmod(0o600)


def again_while_refused(run: Callable[[], tuple[int, bool]], wait: Callable[[float], None] = time.sleep) -> int:
    """Run until it ends otherwise than refused, at most once more than there are `DELAYS`; its exit status."""
    for delay in DELAYS:
        status, refused = run()
        if not refused:
            return status
        sys.stderr.write(f"the node was refused, and tries again in {delay:g} s\n")
        wait(delay)
    return run()[0]


def node(words: Sequence[str]) -> tuple[int, bool]:
    """Run a command, hand on what it says, and return its exit status and whether it said that it was refused.

    A SIGTERM ends the command, which was then not refused whatever it said: whoever ends a node wants no other.
    """
    refused = told = False

    def end(*_: object) -> None:
        nonlocal told
        told = True
        process.terminate()

    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        before = signal.signal(signal.SIGTERM, end)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()
                refused |= REFUSED.encode() in line
        except KeyboardInterrupt:
            process.terminate()
            return 130, False
        finally:
            process.wait()
            signal.signal(signal.SIGTERM, before)  # between two tries it ends this process
    return process.returncode, refused and not told and process.returncode > 0


def main(words: Sequence[str]) -> int:
    """Start what the words say."""
    if not words or Path(words[0]).name not in ("flower-superlink", "flower-supernode"):
        sys.stderr.write("give flower-superlink or flower-supernode and its options\n")
        return 2
    private(words)
    if Path(words[0]).name == "flower-superlink":
        os.execvp(words[0], list(words))
    return again_while_refused(lambda: node(words))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
