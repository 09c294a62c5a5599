"""What of an upload goes into a secure sum: the server's `terms`, computed by the client, and its number of samples."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlscl.client import Client
from fedlscl.federation.secure.fixed_point import Shapes
from fedlscl.messages import Schema, Upload
from fedlscl.server import Server, Total

SAMPLES = "number of samples"


def terms_of(client: Client, server: Server, least: int) -> dict[str, Tensor]:
    """What a client that has been fitted adds to the sum.

    It looks at its own upload as the server would, which sees it no more. Noise is added afterwards.

    Args:
        client: the client.
        server: knows what is added up.
        least: how many clients' values are in a sum at least.

    Raises:
        MessageError: if the upload does not fit its schema, or the server's rules.
    """
    upload = Upload.from_bytes(client.upload().to_bytes(), client.upload_schema())
    server.check(upload)
    return _all(upload.samples, client.protected(server.terms(upload), least))


def shapes_of(schema: Schema, server: Server) -> Shapes:
    """The names and shapes of what every client adds, from the schema of an upload."""
    zeros = {name: torch.zeros(spec.largest, dtype=spec.dtype) for name, spec in schema.items()}
    terms = server.terms(Upload(0, 0, 0, 0, zeros))
    return {name: tensor.shape for name, tensor in _all(0, terms).items()}


def total_of(tensors: Mapping[str, Tensor], clients: tuple[int, ...]) -> Total:
    """The sums of all of it over some clients, as the server hears of them."""
    sums = dict(tensors)
    return Total(clients, int(sums.pop(SAMPLES)), sums)


def _all(samples: int, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    everything = {SAMPLES: torch.tensor(samples), **terms}
    return dict(sorted(everything.items()))  # one behind another they must be in the same order at every client
