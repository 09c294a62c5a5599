"""Which node is which client, told by the key that it signs its requests with, and how long a silent one is waited for.

Flower's SuperLink checks the signatures and says which key a node has. With node authentication on it lets in those
whose keys were registered, and nobody else. In a simulation nodes have no keys, and their numbers are their own.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable

import torch
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from torch import Tensor

log = logging.getLogger(__name__)

ANY = "*"
"""Stands for a key where whoever says first that it is the client is believed."""

_NAMED = re.compile(r"(\d{1,9})=(SHA256:[A-Za-z0-9+/]{43}|\*)")


def fingerprint(public: str) -> str:
    """What `ssh-keygen -lf` prints of a key in OpenSSH's format: SHA256 and 43 characters.

    Raises:
        ValueError: if it is no such key.
    """
    parts = public.split()
    if len(parts) < 2:
        raise ValueError("a public key in OpenSSH's format has a kind and, behind a space, the key")
    digest = hashlib.sha256(base64.b64decode(parts[1], validate=True)).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def key_of(public_key: bytes) -> str | None:
    """The fingerprint of a node's key as Flower says it, in PEM; None for what is no key, as in a simulation."""
    try:
        public = load_pem_public_key(public_key).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    except (ValueError, UnsupportedAlgorithm):
        return None
    return fingerprint(public.decode())


class Bindings:
    """The key of each client: as the run's configuration names it, else of the node that was the first to say so.

    Args:
        clients: how many there are.
        named: a comma between entries such as ``0=SHA256:...``, the client and its key's fingerprint; ``*`` for a key
            stands for whoever says so.
        learned: digests (clients, 32) in uint8 that `learned` returned earlier, zeros where there is none.

    Raises:
        ValueError: if an entry is none, or names a client or key twice.
    """

    def __init__(self, clients: int, named: str = "", learned: Tensor | None = None) -> None:
        self.named: dict[int, str] = {}
        for entry in filter(None, (part.strip() for part in named.split(","))):
            match = _NAMED.fullmatch(entry)
            if match is None or not int(match[1]) < clients:
                raise ValueError(
                    f"clients has the entry '{entry[:80]}', must be a client from 0 to {clients - 1} and the "
                    "fingerprint of its node's key, as `ssh-keygen -lf` prints it: 0=SHA256:..., or 0=* for any"
                )
            if int(match[1]) in self.named or (match[2] != ANY and match[2] in self.named.values()):
                raise ValueError(f"clients names client {match[1]}, or its key, twice")
            self.named[int(match[1])] = match[2]
        self.clients = clients
        self.keys: dict[int, str] = {}
        for client, digest in enumerate(() if learned is None else learned):
            if bool(digest.any()):
                encoded = base64.b64encode(bytes(digest.tolist())).decode().rstrip("=")
                self.keys[client] = f"SHA256:{encoded}"
        self.keys |= {client: key for client, key in self.named.items() if key != ANY}

    def meet(self, client: int, key: str | None) -> str | None:
        """Let a node be a client, or say why it cannot be; the first of a client that is not named is remembered."""
        if self.named.get(client) == ANY:
            return None
        bound = self.keys.get(client)
        if bound is not None and key != bound:
            found = f"the key {key}" if key else "no key"
            return (
                f"it says that it is client {client}, whose key is {bound}, and has {found}; `clients` can name another"
            )
        if key is None or bound is not None:
            return None
        if others := [other for other, its in self.keys.items() if its == key]:
            return f"it says that it is client {client}, and has the key of client {others[0]}"
        log.warning(
            "client %d is from now on at the node with the key %s, which was the first to say so; name the clients' "
            "keys in the run's configuration to be sure: clients='%d=%s'", client, key, client, key
        )  # fmt: skip
        self.keys[client] = key
        return None

    def learned(self) -> Tensor:
        """The digests (clients, 32) of all keys, zeros where there is none."""
        digests = torch.zeros((self.clients, 32), dtype=torch.uint8)
        for client, key in self.keys.items():
            digests[client] = torch.tensor(list(base64.b64decode(f"{key.removeprefix('SHA256:')}=")), dtype=torch.uint8)
        return digests


class Patience:
    """Whom to send messages: not to a client that has let those of several rounds in a row run into the time-out.

    It is dropped, and its node is asked again whose it is after two rounds, after four the next time, and so on; or
    once its node was away, which a new start of it brings about. If the node answers, the client takes part again, and
    is dropped again by the first round that it misses.

    Args:
        rounds: how many.

    Raises:
        ValueError: if that is no whole number from 1 on.
    """

    def __init__(self, rounds: int) -> None:
        if type(rounds) is not int or rounds < 1:
            raise ValueError(f"patience is {rounds!r}, must be a whole number of rounds from 1 on")
        self.rounds = rounds
        self.dropped: dict[int, tuple[int, int]] = {}  # by node the client, and the round from which it is asked again
        self._missed, self._drops = Counter[int](), Counter[int]()

    def clients(self) -> set[int]:
        """Those who are dropped."""
        return {client for client, _ in self.dropped.values()}

    def nodes(self, online: Collection[int], round: int) -> set[int]:
        """The nodes that are not to be asked whose they are."""
        self.dropped = {
            node: (client, until) for node, (client, until) in self.dropped.items() if node in online and round < until
        }
        return set(self.dropped)

    def end(self, round: int, late: Iterable[int], heard: Iterable[int], nodes: dict[int, int]) -> list[int]:
        """Count a round.

        Args:
            round: its number.
            late: clients that let one of its messages run into the time-out.
            heard: clients that replied to one.
            nodes: the node of each client.

        Returns:
            The nodes that are dropped now.
        """
        late = set(late)
        for client in set(heard) - late:
            self._missed[client] = 0
        now = []
        for client in sorted(late):
            self._missed[client] += 1
            if self._missed[client] >= self.rounds and client in nodes:
                self._drops[client] += 1
                again = round + 1 + 2 ** self._drops[client]
                self.dropped[nodes[client]] = client, again
                self._missed[client] = self.rounds - 1
                now.append(nodes[client])
                log.warning("client %d is dropped, and asked again in round %d: %s", client, again, self.reason())
        return now

    def reason(self) -> str:
        """Why somebody is dropped."""
        return f"no reply in time in {self.rounds} rounds in a row"
