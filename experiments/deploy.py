"""A federation of separate processes on this machine: SuperLink and SuperNodes with TLS and node authentication.

    python experiments/deploy.py FOLDER [--timeout SECONDS] [--simulate CPUS] -- --config experiments/digits.yaml

deals the data out, makes certificates and keys, starts everything on loopback, runs to the end and stops it all again.
FOLDER then holds ``server`` with the run folder, and ``client-0`` and so on, each with its share of the data, its key
and its state. The same command continues a run that was interrupted. What it does, and in which order, is what a
deployment on several machines takes as well. With --simulate the clients are Flower's simulated nodes instead, one for
each of so many CPUs at the same time, and ``server`` holds everything.
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedlscl.cli import main as fedlscl
from fedlscl.deployment.flower.nodes import fingerprint
from fedlscl.run.configuration import Configuration

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
LINK = "loopback"
START_SECONDS = 60.0


class Deployment:
    """All processes of one federation; a context manager that ends them.

    Args:
        folder: for everything.
        words: the words behind `fedlscl fit`, paths absolute.
        timeout: seconds that clients have to reply.
        simulate: CPUs for simulated clients, one each; 0 for nodes in processes of their own.
    """

    def __init__(self, folder: Path, words: Sequence[str], timeout: float = 3600, simulate: int = 0) -> None:
        self.folder, self.words, self.timeout, self.simulate = folder.resolve(), list(words), timeout, simulate
        self.port = _free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
            "FLWR_HOME": str(self.folder / "flower"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "NO_COLOR": "1",
        }

    def __enter__(self) -> Self:
        """Deal the data out and make keys, where that was not done before, and start the SuperLink."""
        home = self.folder / "flower"
        home.mkdir(parents=True, exist_ok=True)
        link = f'[superlink]\ndefault = "{LINK}"\n\n[superlink.{LINK}]\naddress = "127.0.0.1:{self.port}"\n'
        if self.simulate:
            (self.folder / "server").mkdir(exist_ok=True)
            (home / "config.toml").write_text(f"{link}insecure = true\n")
        else:
            if not (self.folder / "server" / "share.json").exists():
                fedlscl(["deal", str(self.folder), *self.words])  # here, where all is imported
            if not (self.folder / "server" / "certificate.pem").exists():
                certificates(self.folder / "server")
            authority = self.folder / "server" / "authority.pem"
            (home / "config.toml").write_text(f'{link}root-certificates = "{authority}"\n')
        self.clients = len(list(self.folder.glob("client-*/share.json")))
        try:
            self.start_superlink()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End every process."""
        for name in list(self.processes):
            self.stop(name)

    def start_superlink(self) -> None:
        """Start the SuperLink, which starts the server's app; it knows its nodes from its data base."""
        options: tuple[str, ...] = (
            *("--ssl-ca-certfile=authority.pem", "--ssl-certfile=certificate.pem", "--ssl-keyfile=key.pem"),
            "--enable-supernode-auth",
        )
        if self.simulate:
            options = ("--insecure", "--simulation")
        self.start(
            "server",
            self.folder / "server",
            *("flower-superlink", "--host=127.0.0.1", f"--port={self.port}", "--database=superlink.db"),
            *("--disable-runtime-dependency-installation", *options),
        )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.2)
        raise RuntimeError(f"the SuperLink does not listen: {self.log('server')[-2000:]}")

    def register(self, name: str) -> None:
        """Make a key for a node and let the SuperLink know it, once; a node without that is refused."""
        done = self.folder / name / "registered"
        if not done.exists():
            node_key(self.folder / name / "node")
            self.flwr("supernode", "register", str(self.folder / name / "node.pub"), LINK)
            done.touch()

    def start_node(self, name: str, *, client: int | None = None, data: str = ".", more: str = "") -> None:
        """Start a SuperNode in its own folder.

        Args:
            name: the folder.
            client: which client it is; by default the one in the folder's name.
            data: the folder of its share, seen from its own.
            more: further fields of the node's configuration.
        """
        number = int(name.rpartition("-")[2]) if client is None else client
        self.start(
            name,
            self.folder / name,
            *("flower-supernode", f"--superlink=127.0.0.1:{self.port}", f"--port={_free_port()}"),
            f"--root-certificates={self.folder / 'server' / 'authority.pem'}",
            *("--auth-supernode-private-key=node", f"--node-config=client={number} data='{data}' {more}"),
        )

    def start(self, name: str, folder: Path, *command: str) -> None:
        """Start a process of Flower's in a folder; what it writes goes to ``output.log`` there."""
        starter = (sys.executable, "-m", "fedlscl.deployment.flower.start")
        with (folder / "output.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [*starter, BIN / command[0], *command[1:]],
                cwd=folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        """End a process and all that it has started."""
        process = self.processes.pop(name)
        _signal(process, how)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        _signal(process, signal.SIGKILL)  # its children may outlive it
        process.wait()

    def run(self) -> int:
        """Submit the run; the server continues where its run folder stands.

        Returns:
            Flower's number of the run.
        """
        config = self.folder / "run.toml"
        values = {"words": shlex.join(self.words), "data": "" if self.simulate else ".", "timeout": self.timeout}
        shares = sorted(self.folder.glob("client-*/share.json"))
        public = [path for share in shares if (path := share.with_name("node.pub")).exists()]
        keys = {path.parent.name.removeprefix("client-"): fingerprint(path.read_text()) for path in public}
        values["clients"] = ",".join(f"{client}={key}" for client, key in keys.items())
        config.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))
        options = [f"--run-config={config}", "--format=json"]
        if self.simulate:
            clients = Configuration(self.words).build().data.split_spec.clients
            options.append(
                f"--federation-config=num-supernodes={clients} client-resources-num-cpus=1 "
                f"init-args-num-cpus={self.simulate}"
            )
        answer = self.flwr("run", str(HERE / "flower"), LINK, *options)
        return int(answer["run-id"])

    def status(self, run_id: int) -> dict[str, Any]:
        """What Flower says about a run."""
        runs: list[dict[str, Any]] = self.flwr("ls", LINK, f"--run-id={run_id}", "--format=json")["runs"]
        return runs[0]

    def wait(self, run_id: int) -> dict[str, Any]:
        """Wait until a run has ended, and return what Flower says about it.

        Raises:
            RuntimeError: if it failed, with the end of the server's output.
        """
        while not (status := self.status(run_id))["status"].startswith("finished"):
            time.sleep(15)  # each question is a process that takes seconds of a core
        if status["status"] != "finished:completed":
            raise RuntimeError(f"the run has {status['status']}: {self.log('server')[-3000:]}")
        return status

    def flwr(self, *words: str) -> Any:
        """A command of Flower's; its answer, if it is JSON."""
        done = subprocess.run([BIN / "flwr", *words], env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"flwr {' '.join(words)}: {done.stdout[-1000:]}{done.stderr[-1000:]}")
        return json.loads(done.stdout) if "--format=json" in words else None

    def log(self, name: str) -> str:
        """What a process has written."""
        return (self.folder / name / "output.log").read_text(errors="replace")


def certificates(folder: Path) -> None:
    """A certificate authority of its own, and a certificate for this machine's loopback address."""
    folder.mkdir(parents=True, exist_ok=True)
    authority, key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fedlscl loopback")])
    now = datetime.datetime.now(datetime.UTC)

    def builder(subject: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        made = x509.CertificateBuilder().subject_name(subject).issuer_name(name).public_key(public)
        made = made.serial_number(x509.random_serial_number())
        return made.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=30))

    own = builder(name, authority.public_key()).add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
    here = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = builder(here, key.public_key()).add_extension(names, critical=False)
    _write_key(folder / "key.pem", key, serialization.PrivateFormat.PKCS8)
    for path, made in (("authority.pem", own), ("certificate.pem", certificate)):  # last what says that all is there
        (folder / path).write_bytes(made.sign(authority, hashes.SHA384()).public_bytes(serialization.Encoding.PEM))


def node_key(path: Path) -> None:
    """A node's key pair: `path` and `path`.pub."""
    path.parent.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    _write_key(path, key, serialization.PrivateFormat.OpenSSH)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_name(f"{path.name}.pub").write_bytes(public)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> None:
    content = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    path.touch(mode=0o600)
    path.write_bytes(content)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _signal(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, how)


def absolute(words: Sequence[str]) -> list[str]:
    """Words with the paths of files that are there made absolute: every node starts in a folder of its own."""

    def one(word: str) -> str:
        name, _, value = word.partition("=")
        if value and Path(value).exists():
            return f"{name}={Path(value).resolve()}"
        return str(Path(word).resolve()) if not word.startswith("-") and Path(word).exists() else word

    return [one(word) for word in words]


def main() -> None:
    """Run a federation from start to end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that clients have to reply")
    parser.add_argument("--simulate", type=int, default=0, metavar="CPUS", help="simulate the clients on so many CPUs")
    parser.add_argument("words", nargs="+", help="the words behind `fedlscl fit`, after --")
    options = parser.parse_args()
    with Deployment(options.folder, absolute(options.words), options.timeout, options.simulate) as deployed:
        for index in range(deployed.clients):
            deployed.register(f"client-{index}")
            deployed.start_node(f"client-{index}")
        started = time.monotonic()
        status = deployed.wait(deployed.run())
        print(f"finished after {time.monotonic() - started:.1f} s; Flower's account: {json.dumps(status)}")
    for path in (options.folder / "server").glob("runs/*/summary.json"):
        summary = json.loads(path.read_text())
        print(path, {mask: round(values["final_average"], 2) for mask, values in summary["accuracy"].items()})


if __name__ == "__main__":
    main()
