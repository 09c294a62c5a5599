"""One federation three times: in one process, on Flower's simulated nodes, and in separate processes with TLS.

    python experiments/parity.py FOLDER [fields behind `fedlscl fit`]

prints a table of accuracies, payload, traffic as Flower counts it and wall time, and whether all numbers are equal.
The default is the quickstart with one thread.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from deploy import BIN, HERE, Deployment, absolute
from faults import summary_of

QUICKSTART = [f"--config={HERE / 'digits.yaml'}"]
FIXED = ["--threads=1", "--trainer.accelerator=cpu", "--tracking.wandb_mode=disabled"]
EQUAL = ("accuracy", "bytes_up", "bytes_down", "skipped", "compute", "split_sha256")


def in_process(folder: Path, words: list[str]) -> tuple[dict[str, Any], float, int | None]:
    """`fedlscl fit`: its summary and wall time."""
    started = time.monotonic()
    subprocess.run([BIN / "fedlscl", "fit", *words, f"--run_dir={folder}"], check=True, capture_output=True)
    return json.loads((folder / "summary.json").read_text()), time.monotonic() - started, None


def on_flower(folder: Path, words: list[str], simulate: int) -> tuple[dict[str, Any], float, int | None]:
    """The server's summary, the wall time from the submission of the run to its end, and Flower's traffic in bytes."""
    with Deployment(folder, words, simulate=simulate) as deployed:
        for index in range(deployed.clients):
            deployed.register(f"client-{index}")
            deployed.start_node(f"client-{index}")
        started = time.monotonic()
        status = deployed.wait(deployed.run())
        seconds = time.monotonic() - started
    return summary_of(folder), seconds, None if simulate else status["network-traffic"]["total-bytes"]


def main() -> None:
    """All three, and the table."""
    folder, words = Path(sys.argv[1]).resolve(), [*(absolute(sys.argv[2:]) or QUICKSTART), *FIXED]
    rows = {
        "in one process": in_process(folder / "one", words),
        "simulation, 2 CPUs": on_flower(folder / "simulated", words, 2),
        "deployment, TLS": on_flower(folder / "deployed", words, 0),
    }
    expected = rows["in one process"][0]
    print("| engine | task | seen | federation | none | payload up + down | Flower's traffic | wall time | equal |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    different = False
    for name, (summary, seconds, traffic) in rows.items():
        accuracy = " | ".join(f"{values['final_average']:.4f}" for values in summary["accuracy"].values())
        payload = summary["bytes_up"]["total"] + summary["bytes_down"]["total"]
        same = all(summary[key] == expected[key] for key in EQUAL)
        different |= not same
        counted = "–" if traffic is None else f"{traffic:,}"
        print(f"| {name} | {accuracy} | {payload:,} | {counted} | {seconds:.0f} s | {'yes' if same else 'NO'} |")
    if different:
        sys.exit("the numbers differ")


if __name__ == "__main__":
    main()
