"""A client's side of a secure sum.

Its secrets are drawn from the operating system, anew in each session, and none is used twice: every step is done once
and in its order, whatever the server asks for, and of each client one share is given away and never the other.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Self

import torch
from cryptography.exceptions import InvalidTag
from torch import Tensor

from fedlscl.federation.secure import masks, shamir, words
from fedlscl.federation.secure.fixed_point import MOST_BITS, encode, layout
from fedlscl.messages import MessageError, Schema
from fedlscl.schedule import Round

STEPS = (words.ADVERTISE, words.SHARE, words.MASK, words.UNMASK)


class Party:
    """One client in one session.

    Args:
        client: its number.
        round: the round.
    """

    def __init__(self, client: int, round: Round) -> None:
        self.client, self.round = client, round
        self._done = 0  # steps
        self._kept: dict[str, Tensor] = {}

    def state(self) -> dict[str, Tensor]:
        """What it must know in the next step, secrets included; none of them when all is done."""
        return {"done": torch.tensor(self._done), **self._kept}

    @classmethod
    def restored(cls, client: int, round: Round, state: Mapping[str, Tensor]) -> Self:
        """What `state` returned."""
        party = cls(client, round)
        party._kept = dict(state)
        party._done = int(party._kept.pop("done"))
        return party

    def reply(self, step: str, message: bytes) -> bytes:
        """Take a step in which the client has nothing to add of its own.

        Raises:
            MessageError: if the server's message does not fit this step; likewise in all others.
        """
        return {words.ADVERTISE: self.advertise, words.SHARE: self.share, words.UNMASK: self.unmask}[step](message)

    def advertise(self, message: bytes) -> bytes:
        """Draw secrets, and tell what everybody may know of them."""
        session = words.to_bytes(self._read(words.ADVERTISE, message, words.INVITATION)["session"])
        channel, mask, seed = (secrets.token_bytes(masks.KEY) for _ in range(3))
        public = words.rows_of([masks.public_of(channel), masks.public_of(mask), masks.commitment(seed)])
        self._kept = {"session": words.of_bytes(session), "secrets": words.rows_of([channel, mask, seed])}
        return self._write({"keys": public})

    def share(self, message: bytes) -> bytes:
        """Seal for every client, this one included, a share of the key of its masks and one of its seed."""
        roster = self._read(words.SHARE, message, words.ROSTER)
        clients, keys = roster["clients"].tolist(), roster["keys"]
        threshold, bits = int(roster["threshold"]), roster["bits"].tolist()
        if len(keys) != len(clients) or len(set(clients)) != len(clients) or self.client not in clients:
            raise MessageError("the list of clients is not one with this client in it and a key for each")
        own = words.rows_of(masks.public_of(self._secret(n)) for n in (0, 1))
        if not torch.equal(keys[clients.index(self.client)][:2], own):
            raise MessageError("the list of clients has other keys of this client than its own")
        if not len(clients) >= threshold > len(clients) // 2:
            # else two halves could each reveal one of the two secrets of a client
            raise MessageError(f"the threshold is {threshold}, must be more than half of the {len(clients)} clients")
        if wrong := [number for number in bits if not 1 <= number <= MOST_BITS]:
            raise MessageError(f"{wrong[0]} bits behind the point, must be from 1 to {MOST_BITS}")
        dealt = [shamir.split(self._secret(n), clients, threshold) for n in (1, 2)]
        self._kept |= {name: roster[name] for name in ("clients", "keys", "threshold", "bits", "layout")}
        pairs = zip(clients, *dealt, strict=True)
        return self._write(
            {
                "sealed": words.rows_of(
                    masks.sealed(self._channel(other), key + seed, self.client, other) for other, key, seed in pairs
                )
            }
        )

    @property
    def threshold(self) -> int:
        """How many clients' values are in the sum at least; known after `share`."""
        return int(self._kept["threshold"])

    def mask(self, message: bytes, tensors: Mapping[str, Tensor]) -> bytes:
        """Put values under masks that come off in the sum over all clients that are still there.

        Args:
            message: the server's.
            tensors: what is to be added up, the same names and shapes at every client.

        Raises:
            ValueError: if a value is beyond the range of the fixed point, by the name of its tensor.
        """
        delivery = self._read(words.MASK, message, words.DELIVERY)
        clients, sealed = delivery["clients"].tolist(), delivery["sealed"]
        known, session = self._kept["clients"].tolist(), words.to_bytes(self._kept["session"])
        if len(sealed) != len(clients) or len(set(clients)) != len(clients) or not {self.client, *clients} <= {*known}:
            raise MessageError("what was sealed for this client is not of clients that it knows")
        if self.client not in clients or len(clients) < int(self._kept["threshold"]):
            raise MessageError(f"{len(clients)} clients are left, of whom this must be one; too few, or it is not")
        if layout({name: tensor.shape for name, tensor in tensors.items()}) != words.to_bytes(self._kept["layout"]):
            raise MessageError("the server adds up tensors of other names or shapes than this client has")
        if len(bits := self._kept["bits"].tolist()) != len(tensors):
            raise MessageError(f"the server says how many bits {len(bits)} tensors have, of {len(tensors)}")
        vector = masks.checked(encode(tensors, bits, len(clients)))
        masks.add_mask(vector, masks.own_key(self._secret(2), session), 1)
        for other in clients:
            if other != self.client:
                public = words.to_bytes(self._kept["keys"][known.index(other), 1])
                key = masks.agreed_key(self._secret(1), public, session, b"mask")
                masks.add_mask(vector, key, 1 if self.client < other else -1)
        self._kept |= {"sealed": sealed, "senders": delivery["clients"]}
        # of its own secrets only what opens the shares of others is still needed
        self._kept["secrets"] = self._kept["secrets"][:1].clone()
        return self._write({"masked": torch.from_numpy(vector.view("int64"))})

    def unmask(self, message: bytes) -> bytes:
        """Give away the shares of the seeds of those whose values have arrived, and of the keys of the others."""
        survivors = set(self._read(words.UNMASK, message, words.SURVIVORS)["survivors"].tolist())
        senders = self._kept["senders"].tolist()
        if not {self.client} <= survivors <= set(senders) or len(survivors) < int(self._kept["threshold"]):
            raise MessageError(f"{len(survivors)} clients have arrived, too few, or not this one, or strangers")
        shares, opened = [], []
        for sender, sealed in zip(senders, self._kept["sealed"], strict=True):
            try:
                pair = masks.opened(self._channel(sender), words.to_bytes(sealed), sender, self.client)
            except InvalidTag:
                pair = bytes(2 * shamir.SHARE)
                opened.append(False)
            else:
                opened.append(True)
            shares.append(pair[shamir.SHARE :] if sender in survivors else pair[: shamir.SHARE])
        answer = self._write({"shares": words.rows_of(shares), "opened": torch.tensor(opened)})
        self._kept = {}
        return answer

    def _secret(self, number: int) -> bytes:
        """Of what `advertise` has drawn: the key of the channel, the key of the masks, the seed."""
        return words.to_bytes(self._kept["secrets"][number])

    def _channel(self, other: int) -> bytes:
        """The key of messages between this client and another."""
        public = words.to_bytes(self._kept["keys"][self._kept["clients"].tolist().index(other), 0])
        return masks.agreed_key(self._secret(0), public, words.to_bytes(self._kept["session"]), b"channel")

    def _read(self, step: str, message: bytes, schema: Schema) -> Mapping[str, Tensor]:
        """The server's message, if it is time for it; whatever it holds, there is no second one of this step."""
        if self._done != STEPS.index(step):
            raise MessageError(f"the step '{step}' of a secure sum is asked for out of its order, or twice")
        self._done += 1
        session = words.to_bytes(self._kept["session"]) if self._kept else None
        return words.read(message, schema, self.client, self.round, session)

    def _write(self, tensors: Mapping[str, Tensor]) -> bytes:
        return words.write(self.client, self.round, words.to_bytes(self._kept["session"]), tensors)
