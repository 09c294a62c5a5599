"""Masks: key streams of ChaCha20 that are added to integers modulo 2^64, the keys behind them, and a check of sums."""

from __future__ import annotations

import hashlib

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedlscl.federation.secure.fixed_point import Words

KEY = 32  # bytes of every key, seed and commitment
LEAST = 128
"""Words of a masked vector, at least: so many show by their size alone whether they are under a mask, see `bare`."""

_ZEROS = bytes(2**18)  # a key stream is the encryption of zeros; the size is one that stays in a core's cache


def public_of(private: bytes) -> bytes:
    """The public key (X25519) of a private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def commitment(seed: bytes) -> bytes:
    """What a client says of the seed of its own mask before it is known: a hash, which says nothing else."""
    return hashlib.sha256(b"fedlscl seed" + seed).digest()


def agreed_key(private: bytes, public: bytes, session: bytes, purpose: bytes) -> bytes:
    """The key that only the owners of two keys know (X25519, HKDF), the same for both.

    Raises:
        ValueError: if the public key is none.
    """
    secret = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    return _derived(secret, session, purpose)


def own_key(seed: bytes, session: bytes) -> bytes:
    """The key of a client's own mask."""
    return _derived(seed, session, b"own mask")


def usable(public: bytes) -> bool:
    """Whether a public key leads to a secret; with some points of the curve it is the same for everybody."""
    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        return False
    return True


def _derived(secret: bytes, session: bytes, info: bytes) -> bytes:
    return HKDF(SHA256(), KEY, session, b"fedlscl " + info).derive(secret)


def add_mask(words: Words, key: bytes, sign: int) -> None:
    """Add the mask of a key to words, or take it off, where they are.

    Args:
        words: (d,) of any number; changed.
        key: used for no other vector.
        sign: 1 or -1.
    """
    encryptor = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    combine = np.add if sign > 0 else np.subtract
    step = len(_ZEROS) // 8
    for start in range(0, len(words), step):
        part = words[start : start + step]
        combine(part, np.frombuffer(encryptor.update(_ZEROS[: part.nbytes]), "<u8"), out=part)


def sealed(key: bytes, content: bytes, sender: int, receiver: int) -> bytes:
    """A message from one client to another, 16 bytes longer than its content.

    A key is used for one message in each direction, and so the nonce tells the two apart.
    """
    return ChaCha20Poly1305(key).encrypt(_nonce(sender, receiver), content, None)


def opened(key: bytes, message: bytes, sender: int, receiver: int) -> bytes:
    """The content.

    Raises:
        cryptography.exceptions.InvalidTag: if the message is not what the sender sealed for the receiver.
    """
    return ChaCha20Poly1305(key).decrypt(_nonce(sender, receiver), message, None)


def _nonce(sender: int, receiver: int) -> bytes:
    return sender.to_bytes(4) + receiver.to_bytes(4) + bytes(4)


def checked(words: Words) -> Words:
    """Words with zeros behind them, up to `LEAST`, and a check of all of them at the end.

    The check is linear, so that a sum of such vectors has the check of the sum; one from which a mask was not taken off
    has it with a probability of 2^-64.
    """
    padded = np.concatenate([words, np.zeros(max(0, LEAST - len(words)) + 1, np.uint64)])
    padded[-1] = _check(padded[:-1])
    return padded


def length(words: int) -> int:
    """How long `checked` makes a vector of so many words."""
    return max(words, LEAST) + 1


def holds(words: Words) -> bool:
    """Whether the check at the end is that of the words before it."""
    return bool(words[-1] == _check(words[:-1]))


def bare(words: Words) -> bool:
    """Whether there can be no mask on what `checked` gave: all values are small, which masks make 2^-128 likely."""
    signed = words[:-1].view(np.int64)
    return bool(((signed < 2**62) & (signed >= -(2**62))).all())


def _check(words: Words) -> np.uint64:
    odd = np.arange(1, 2 * len(words), 2, dtype=np.uint64)  # so that a change of any one word shows
    return np.uint64(np.multiply(words, odd).sum(dtype=np.uint64))
