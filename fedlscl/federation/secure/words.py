"""What travels in a secure sum, in the format of all messages: named tensors, checked against a schema.

Each bears client, task and round, and the session, which the server draws anew whenever a round begins.

    step         from the server                                from a client
    ADVERTISE    nothing else                                   its two public keys, and a commitment to its seed
    SHARE        the keys of all, threshold, bits, layout       for each client a sealed pair of shares
    MASK         the pairs that were sealed for it              its values under masks
    UNMASK       whose values have arrived                      of each client one of the two shares
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedlscl.federation.secure.masks import KEY
from fedlscl.federation.secure.shamir import SHARE as SHARE_BYTES
from fedlscl.messages import AtMost, Message, MessageError, Schema, TensorSpec
from fedlscl.schedule import Round

ADVERTISE, SHARE, MASK, UNMASK = "advertise", "share", "mask", "unmask"
SESSION = 16  # bytes of what tells sessions apart
SEALED = 2 * SHARE_BYTES + 16  # bytes of two shares under authenticated encryption
MOST = TENSORS = 2**16  # clients, and tensors of each

_BYTES, _ALL = torch.uint8, AtMost(MOST)
_SESSION = {"session": TensorSpec((SESSION,), _BYTES)}

INVITATION: Schema = _SESSION
KEYS: Schema = {**_SESSION, "keys": TensorSpec((3, KEY), _BYTES)}  # to seal with, to mask with, the commitment
ROSTER: Schema = {
    **_SESSION,
    "clients": TensorSpec((_ALL,), torch.int64),
    "keys": TensorSpec((_ALL, 3, KEY), _BYTES),
    "threshold": TensorSpec((), torch.int64),
    "bits": TensorSpec((AtMost(TENSORS),), torch.int64),
    "layout": TensorSpec((KEY,), _BYTES),
}
DELIVERY: Schema = {
    **_SESSION,
    "clients": TensorSpec((_ALL,), torch.int64),
    "sealed": TensorSpec((_ALL, SEALED), _BYTES),
}
SURVIVORS: Schema = {**_SESSION, "survivors": TensorSpec((_ALL,), torch.int64)}


def for_all(clients: int) -> Schema:
    """A sealed pair of shares for each client."""
    return {**_SESSION, "sealed": TensorSpec((clients, SEALED), _BYTES)}


def values(length: int) -> Schema:
    """Words under masks."""
    return {**_SESSION, "masked": TensorSpec((length,), torch.int64)}


def shares(clients: int) -> Schema:
    """A share of each client's, and whether it could be opened."""
    return {
        **_SESSION,
        "shares": TensorSpec((clients, SHARE_BYTES), _BYTES),
        "opened": TensorSpec((clients,), torch.bool),
    }


Tensors = Mapping[str, Tensor]


class Secure(Message):
    """One of these messages."""

    kind = "message of a secure sum"


def write(client: int, round: Round, session: bytes, tensors: Tensors) -> bytes:
    """A message as it travels."""
    return Secure(client, round.task, round.number, 0, {"session": of_bytes(session), **tensors}).to_bytes()


def read(message: bytes, schema: Schema, client: int, round: Round, session: bytes | None) -> Tensors:
    """The tensors of a message.

    Args:
        message: as it travels.
        schema: what it must look like.
        client: from or for whom it must be.
        round: of which round.
        session: of which session; None where this message is the first of it.

    Raises:
        MessageError: if it is not that.
    """
    found = Secure.from_bytes(message, schema)
    if (found.client, found.task, found.round) != (client, round.task, round.number):
        said = f"claims to be of client {found.client}, round {found.round}, task {found.task}"
        raise MessageError(f"{Secure.kind} {said}")
    if session is not None and to_bytes(found.tensors["session"]) != session:
        raise MessageError(f"{Secure.kind} is of another session than this, perhaps sent before")
    return found.tensors


def of_bytes(content: bytes) -> Tensor:
    """(n,) uint8."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def rows_of(parts: Iterable[bytes]) -> Tensor:
    """(k, n) uint8 of k bytes of the same length, one or more."""
    return torch.stack([of_bytes(part) for part in parts])


def to_bytes(tensor: Tensor) -> bytes:
    """The bytes in a tensor of uint8."""
    return tensor.contiguous().numpy().tobytes()
