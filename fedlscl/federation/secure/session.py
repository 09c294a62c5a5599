"""The server's side of a secure sum: it hands messages on, adds up what is under masks, and unmasks the sum.

It holds public keys, messages sealed between clients, one vector that is the sum so far, and in the end shares. No
client's values follow from these, unless as many clients as the threshold says work against it with the server.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fedlscl.federation.secure import masks, shamir, words
from fedlscl.federation.secure.fixed_point import Shapes, decode, layout
from fedlscl.messages import MessageError, Schema
from fedlscl.schedule import Round

log = logging.getLogger(__name__)


class NoSum(ValueError):
    """A secure sum that cannot be formed; the text says why."""


class Session:
    """One secure sum.

    For each step there are the messages to the clients, and a method that takes a client's reply and raises
    `MessageError` where it cannot be used: the client's values are then not in the sum, except in the last step, where
    they are already. The messages raise `NoSum` where fewer clients are left than the threshold.

    Args:
        clients: whose values are to be added up.
        round: the round.
        threshold: how many of them must get to the end.
        bits: behind the point of each tensor, see `fixed_point`.
        shapes: of the tensors that each adds, by name and in this order.
    """

    def __init__(
        self, clients: Sequence[int], round: Round, threshold: int, bits: Sequence[int], shapes: Shapes
    ) -> None:
        self.clients, self.round, self.threshold = list(clients), round, threshold
        self.bits, self.shapes = list(bits), shapes
        self.size = sum(shape.numel() for shape in shapes.values())
        self._id = secrets.token_bytes(words.SESSION)
        self._keys: dict[int, Tensor] = {}  # (3, 32) of each client
        self._seen: set[bytes] = set()
        self._sealed: dict[int, Tensor] = {}  # by sender the rows for all of `_keys`
        self._sum = np.zeros(masks.length(self.size), np.uint64)
        self._arrived: set[int] = set()
        self._shares: dict[int, dict[int, bytes]] = {}  # by the client whose secret it is and by who gave it
        self._gave: set[int] = set()

    # ---- the four steps

    def invitations(self) -> dict[int, bytes]:
        """Ask for keys."""
        return {client: self._write(client) for client in self._enough(self.clients, "take part")}

    def advertised(self, client: int, message: bytes) -> None:
        """Take a client's public keys."""
        keys = self._read(client, message, words.KEYS)["keys"]
        public = {words.to_bytes(row) for row in keys}
        if not all(masks.usable(words.to_bytes(row)) for row in keys[:2]):
            raise MessageError("a public key is none: with it everybody would agree on the same key")
        if len(public) < len(keys) or not public.isdisjoint(self._seen):
            raise MessageError("a public key is there twice, or that of another client")
        self._seen |= public
        self._keys[client] = keys

    def rosters(self) -> dict[int, bytes]:
        """Tell everybody all keys."""
        clients = self._enough(sorted(self._keys), "have sent keys")
        roster = {
            "clients": torch.tensor(clients),
            "keys": torch.stack([self._keys[client] for client in clients]),
            "threshold": torch.tensor(self.threshold),
            "bits": torch.tensor(self.bits),
            "layout": words.of_bytes(layout(self.shapes)),
        }
        return {client: self._write(client, **roster) for client in clients}

    def shared(self, client: int, message: bytes) -> None:
        """Take what a client has sealed for each of the others."""
        self._sealed[client] = self._read(client, message, words.for_all(len(self._keys)))["sealed"]

    def deliveries(self) -> dict[int, bytes]:
        """Hand on what was sealed, and ask for values."""
        senders = self._enough(sorted(self._sealed), "have shared their secrets")
        row = {client: number for number, client in enumerate(sorted(self._keys))}
        return {
            client: self._write(
                client,
                clients=torch.tensor(senders),
                sealed=torch.stack([self._sealed[sender][row[client]] for sender in senders]),
            )
            for client in senders
        }

    def masked(self, client: int, message: bytes) -> None:
        """Add a client's values to the sum, and keep nothing of them."""
        if client not in self._sealed or client in self._arrived:
            raise MessageError("values that nobody has asked for, or asked for a second time")
        vector = self._read(client, message, words.values(len(self._sum)))["masked"].numpy().view(np.uint64)
        if masks.bare(vector):
            raise MessageError("values that are under no mask; they were thrown away")
        self._sum += vector
        self._arrived.add(client)

    def requests(self) -> dict[int, bytes]:
        """Tell everybody whose values have arrived, and ask for shares."""
        survivors = self._enough(sorted(self._arrived), "have sent values")
        return {client: self._write(client, survivors=torch.tensor(survivors)) for client in survivors}

    def revealed(self, client: int, message: bytes) -> None:
        """Take the shares that a client gives away."""
        found = self._read(client, message, words.shares(len(self._sealed)))
        for owner, share, opened in zip(sorted(self._sealed), found["shares"], found["opened"].tolist(), strict=True):
            if opened:
                self._shares.setdefault(owner, {})[client] = words.to_bytes(share)
        self._gave.add(client)

    def total(self) -> dict[str, Tensor]:
        """The sums of all values that have arrived, in float64 by name.

        Raises:
            NoSum: if there are too few shares or wrong ones, or some masks are still on the sum.
        """
        self._enough(sorted(self._gave), "have helped to take the masks off")
        for owner in sorted(self._sealed):
            secret = self._secret_of(owner)
            if owner in self._arrived:
                masks.add_mask(self._sum, masks.own_key(secret, self._id), -1)
                continue
            for other in self._arrived:
                public = words.to_bytes(self._keys[other][1])
                key = masks.agreed_key(secret, public, self._id, b"mask")
                masks.add_mask(self._sum, key, -1 if other < owner else 1)
        if not masks.holds(self._sum):
            raise NoSum("the masks do not cancel: a client has masked its values with other keys than it advertised")
        return decode(self._sum[: self.size], self.bits, self.shapes)

    @property
    def survivors(self) -> tuple[int, ...]:
        """Whose values are in the sum, ascending."""
        return tuple(sorted(self._arrived))

    # ---- secrets

    def _secret_of(self, owner: int) -> bytes:
        """The seed of a client whose values have arrived, the key of one whose values have not.

        It is compared with what the client advertised, so that a wrong share leads to no wrong sum. One client's wrong
        shares are told by leaving out each client in turn, where there are more than the threshold.
        """
        shares, arrived = self._shares.get(owner, {}), owner in self._arrived
        if len(shares) < self.threshold:
            raise NoSum(
                f"{len(shares)} of {len(self._gave)} clients could open what client {owner} has sealed for them, must "
                f"be at least {self.threshold}"
            )
        of_secret = masks.commitment if arrived else masks.public_of
        expected = words.to_bytes(self._keys[owner][2 if arrived else 1])
        for without, givers in self._choices(sorted(shares)):
            secret = shamir.combine({giver: shares[giver] for giver in givers})
            if secret is not None and of_secret(secret) == expected:
                if without is not None:
                    log.warning("client %d has given a wrong share of client %d's secret", without, owner)
                return secret
        raise NoSum(
            f"the shares of client {owner}'s {'seed' if arrived else 'key'} do not lead to what it has advertised: it, "
            "or some who gave them, have changed them"
        )

    def _choices(self, givers: list[int]) -> Iterator[tuple[int | None, list[int]]]:
        """As many clients as the threshold says, in some ways, and who of those that would be among them is not."""
        first = givers[: self.threshold]
        yield None, first
        if len(givers) > self.threshold:
            for without in first:
                yield without, [giver for giver in givers[: self.threshold + 1] if giver != without]

    # ---- messages

    def _enough(self, clients: list[int], did: str) -> list[int]:
        if len(clients) < self.threshold:
            raise NoSum(f"{len(clients)} clients {did}, must be at least {self.threshold}")
        return clients

    def _write(self, client: int, **tensors: Tensor) -> bytes:
        return words.write(client, self.round, self._id, tensors)

    def _read(self, client: int, message: bytes, schema: Schema) -> words.Tensors:
        return words.read(message, schema, client, self.round, self._id)
