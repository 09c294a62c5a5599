"""What crosses Flower's wire: the serialised `Upload` and `Download` as they are in one process, and numbers."""

from __future__ import annotations

import hashlib
import json
import math
import re

from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

from fedlscl.data.module import FederatedDataModule

FIT, END, WHO, COST, SECURE = "train", "evaluate", "query.who", "query.cost", "query.secure"
UPLOAD, MASKING = "upload", "masking"
ENDS = ("task", "round", "accepted")
_STYPE = "safetensors"
METRIC, MOST_METRICS = re.compile(r"[\w/.-]{1,64}"), 64


def names_sha256(data: FederatedDataModule) -> str:
    """What tells lists of classes apart."""
    return hashlib.sha256(json.dumps(data.class_names).encode()).hexdigest()


def array_of(message: bytes) -> Array:
    """A serialised message as Flower carries it."""
    return Array("uint8", (len(message),), _STYPE, message)


def payload(content: RecordDict, name: str) -> bytes:
    """The serialised message under a name.

    Raises:
        ValueError: if there is none.
    """
    array = content.array_records.get(name, ArrayRecord()).get(name)
    if array is None or array.stype != _STYPE:
        raise ValueError(f"the reply holds no '{name}'")
    return array.data


def metrics_of(content: RecordDict, name: str) -> dict[str, float]:
    """The metrics under a name; none if there is nothing.

    Raises:
        ValueError: if one is no finite number, has no name for a metric, or there are too many.
    """
    numbers: dict[str, float] = {}
    for key, value in content.metric_records.get(name, MetricRecord()).items():
        if isinstance(value, list) or not math.isfinite(value):
            raise ValueError(f"{name}: {key[:64]} is {str(value)[:40]}, must be a finite number")
        if not METRIC.fullmatch(key) or len(numbers) == MOST_METRICS:
            raise ValueError(f"{name}: {key[:64]!r} is no name of a metric, or one too many")
        numbers[key] = value
    return numbers
