"""Messages: what fits the schema comes back as it was; everything else is refused by name and in no other way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlscl.messages import (
    AtMost,
    Download,
    Message,
    MessageError,
    Received,
    Schema,
    TensorSpec,
    Upload,
    in_a_line,
    not_negative,
    optional,
    schema_of,
    semidefinite,
    unit_rows,
)

SCHEMA: Schema = {
    "weight": TensorSpec((2, 3)),
    "features": TensorSpec((AtMost(4), 3)),
    "batches": TensorSpec((), torch.int64),
}
NUMBERS = ("client", "task", "round", "samples")


def tensors(rows: int = 2) -> dict[str, Tensor]:
    return {
        "weight": torch.tensor([[1.5, -2.0, 3e-40], [0.0, -0.0, 1e14]]),
        "features": torch.arange(rows * 3, dtype=torch.float32).view(rows, 3) - 1,
        "batches": torch.tensor(2**53 + 1),
    }


def upload(**changes: Tensor | None) -> Upload:
    """An upload that fits, but for `changes`; None leaves a tensor out."""
    changed = {**tensors(), **changes}
    return Upload(1, 2, 3, 40, {name: tensor for name, tensor in changed.items() if tensor is not None})


def frame(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


GOOD = upload().to_bytes()
HEADER, BODY = parts(GOOD)


def check_fits(message: Message, schema: Schema = SCHEMA) -> None:
    """All that a message promises whoever goes on with it."""
    assert set(message.tensors) == set(schema)
    for name, spec in schema.items():
        tensor = message.tensors[name]
        assert spec.problem(tuple(tensor.shape), tensor.dtype) is None
        assert not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
    for name in NUMBERS:
        number = getattr(message, name)
        assert type(number) is int
        assert 0 <= number < 10**18


def accepted_or_refused(data: bytes) -> None:
    """Any other exception than MessageError fails the test."""
    try:
        message = Upload.from_bytes(data, SCHEMA)
    except MessageError:
        return
    check_fits(message)


# -------------------------------------------------------------- what comes back


def test_a_message_comes_back_as_it_was() -> None:
    sent = upload()
    got = Upload.from_bytes(sent.to_bytes(), SCHEMA)
    assert type(got) is Upload
    assert (got.client, got.task, got.round, got.samples) == (1, 2, 3, 40)
    assert set(got.tensors) == set(sent.tensors)
    for name, tensor in sent.tensors.items():
        assert got.tensors[name].dtype == tensor.dtype
        assert got.tensors[name].shape == tensor.shape
        assert got.tensors[name].numpy().tobytes() == tensor.numpy().tobytes()
    assert type(Download.from_bytes(GOOD, SCHEMA)) is Download


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool],
)
def test_every_dtype_travels(dtype: torch.dtype) -> None:
    sent = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    data = Download(0, 0, 0, 0, {"x": sent}).to_bytes()
    got = Download.from_bytes(data, {"x": TensorSpec.like(sent)}).tensors["x"]
    assert got.dtype == dtype
    assert got.equal(sent)


def test_views_and_tensors_in_training_travel_as_their_values() -> None:
    live = torch.nn.Parameter(torch.arange(6.0).view(3, 2))
    view = live.T
    got = Download.from_bytes(Download(0, 0, 0, 0, {"x": view}).to_bytes(), {"x": TensorSpec((2, 3))}).tensors["x"]
    assert got.equal(torch.tensor([[0.0, 2, 4], [1, 3, 5]]))
    assert not got.requires_grad
    got += 1
    assert live[0, 0] == 0


def test_a_message_without_tensors() -> None:
    got = Upload.from_bytes(Upload(0, 1, 2, 3, {}).to_bytes(), {})
    assert (got.client, got.task, got.round, got.samples, dict(got.tensors)) == (0, 1, 2, 3, {})


def test_equal_content_is_equal_bytes_in_whatever_order_it_was_put_together() -> None:
    backwards = dict(reversed([*tensors().items()]))
    for _ in range(20):
        assert upload().to_bytes() == GOOD
        assert Upload(1, 2, 3, 40, backwards).to_bytes() == GOOD
        assert Upload.from_bytes(GOOD, SCHEMA).to_bytes() == GOOD
    other_values = upload(weight=torch.zeros(2, 3)).to_bytes()
    assert len(other_values) == len(GOOD)


def test_a_message_costs_its_tensors_and_a_small_header() -> None:
    assert len(BODY) == 4 * 6 + 4 * 6 + 8
    assert len(GOOD) - len(BODY) < 400


@given(
    st.tuples(*[st.integers(0, 10**18 - 1)] * 4),
    st.lists(st.floats(-999999986991104.0, 999999986991104.0, width=32), min_size=3, max_size=12).filter(
        lambda values: len(values) % 3 == 0
    ),
)
@settings(max_examples=50, deadline=None)
def test_any_numbers_and_values_come_back(numbers: tuple[int, int, int, int], values: list[float]) -> None:
    features = torch.tensor(values).view(-1, 3)
    got = Upload.from_bytes(Upload(*numbers, tensors={**tensors(), "features": features}).to_bytes(), SCHEMA)
    assert (got.client, got.task, got.round, got.samples) == numbers
    assert got.tensors["features"].equal(features)


# ---------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": None}, r"upload lacks tensors \['weight'\] and has unknown tensors \[\]"),
        ({"labels": torch.zeros(1)}, r"upload lacks tensors \[\] and has unknown tensors \['labels'\]"),
        ({"weight": None, "Weight": torch.ones(2, 3)}, r"lacks tensors \['weight'\] .* unknown tensors \['Weight'\]"),
        ({"weight": torch.ones(3, 2)}, r"tensor 'weight' has shape \(3, 2\), expected \(2, 3\)"),
        ({"weight": torch.ones(6)}, r"tensor 'weight' has shape \(6,\), expected \(2, 3\)"),
        ({"weight": torch.ones(1, 2, 3)}, r"tensor 'weight' has shape \(1, 2, 3\), expected \(2, 3\)"),
        ({"batches": torch.ones(1).long()}, r"tensor 'batches' has shape \(1,\), expected \(\)"),
        ({"weight": torch.ones(2, 3).double()}, r"tensor 'weight' has dtype torch.float64, expected torch.float32"),
        ({"weight": torch.ones(2, 3).int()}, r"tensor 'weight' has dtype torch.int32, expected torch.float32"),
        ({"weight": torch.ones(2, 3).to(torch.complex64)}, r"tensor 'weight' has dtype None, expected torch.float32"),
        ({"batches": torch.tensor(1.0)}, r"tensor 'batches' has dtype torch.float32, expected torch.int64"),
        ({"features": torch.ones(2, 4)}, r"tensor 'features' has shape \(2, 4\), expected \(1\.\.4, 3\)"),
        ({"features": torch.ones(0, 3)}, r"tensor 'features' has shape \(0, 3\), expected \(1\.\.4, 3\)"),
        ({"features": torch.ones(5, 3)}, r"tensor 'features' has shape \(5, 3\), expected \(1\.\.4, 3\)"),
    ],
)
def test_what_does_not_fit_the_schema_is_named(changes: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(MessageError, match=message):
        Upload.from_bytes(upload(**changes).to_bytes(), SCHEMA)


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_the_sender_chooses_a_size_up_to_the_limit(rows: int) -> None:
    got = Upload.from_bytes(upload(**tensors(rows)).to_bytes(), SCHEMA)
    assert got.tensors["features"].shape == (rows, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e16, -1e16])
@pytest.mark.parametrize("name", ["weight", "features"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_values_that_are_not_finite_or_huge_are_refused(name: str, value: float, dtype: torch.dtype) -> None:
    changed = {key: torch.ones(2, 3, dtype=dtype) for key in ("weight", "features")}
    schema = {key: TensorSpec.like(tensor) for key, tensor in changed.items()}
    Upload.from_bytes(Upload(0, 0, 0, 0, changed).to_bytes(), schema)
    changed[name][-1, -1] = value
    with pytest.raises(MessageError, match=f"tensor '{name}' holds NaN or infinite values"):
        Upload.from_bytes(Upload(0, 0, 0, 0, changed).to_bytes(), schema)


def test_the_kind_is_named() -> None:
    with pytest.raises(MessageError, match=r"^download lacks"):
        Download.from_bytes(upload(weight=None).to_bytes(), SCHEMA)
    assert issubclass(MessageError, ValueError)


# ------------------------------------------------------------------- damage


def test_every_prefix_is_refused() -> None:
    for length in range(len(GOOD)):
        with pytest.raises(MessageError, match="upload"):
            Upload.from_bytes(GOOD[:length], SCHEMA)


def test_every_single_bit_flip_is_refused_or_still_fits() -> None:
    for position in range(len(GOOD)):
        for bit in range(8):
            damaged = bytearray(GOOD)
            damaged[position] ^= 1 << bit
            accepted_or_refused(bytes(damaged))


@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=8))
@settings(max_examples=300, deadline=None)
def test_random_bytes_in_random_places(changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(GOOD)
    for position, value in changes:
        damaged[position] = value
    accepted_or_refused(bytes(damaged))


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_noise_is_refused(noise: bytes) -> None:
    for data in (noise, frame(noise, BODY), GOOD + noise if noise else b""):
        with pytest.raises(MessageError):
            Upload.from_bytes(data, SCHEMA)


def test_an_oversized_message_is_refused_before_it_is_read() -> None:
    limit = 2**20 + 6 * 4 + 4 * 3 * 4 + 8
    with pytest.raises(MessageError, match=rf"upload has {limit + 1} bytes, at most {limit} fit its schema"):
        Upload.from_bytes(bytes(limit + 1), SCHEMA)
    with pytest.raises(MessageError, match=r"has shape|truncated|damaged|unreadable|lacks"):
        Upload.from_bytes(GOOD + bytes(limit - len(GOOD)), SCHEMA)


@pytest.mark.parametrize("length", [len(GOOD) - 7, 2**20 + 1, 2**31, 2**63, 2**64 - 1])
def test_an_absurd_header_length_is_refused(length: int) -> None:
    with pytest.raises(MessageError, match="truncated or not in the safetensors format"):
        Upload.from_bytes(length.to_bytes(8, "little") + GOOD[8:], SCHEMA)


def test_a_header_over_its_limit_is_refused_though_the_message_would_fit() -> None:
    big = {"weight": TensorSpec((2**20,))}
    header = b" " * (2**20 + 1)
    with pytest.raises(MessageError, match="truncated or not in the safetensors format"):
        Upload.from_bytes(frame(header, bytes(100)), big)


# ------------------------------------------------------------- hostile headers


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"3",
        b'"weight"',
        b"\xff\xfe\x00",
        b"not json at all",
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b'{"weight":' + b"9" * 5000 + b"}",
        json.dumps(HEADER).encode("utf-16"),
        json.dumps(HEADER).encode("utf-8-sig"),
    ],
    ids=lambda header: repr(header[:12]),
)
def test_a_header_that_is_no_json_object_is_refused(header: bytes) -> None:
    with pytest.raises(MessageError, match="upload"):
        Upload.from_bytes(frame(header, BODY), SCHEMA)


def with_entry(**changes: Any) -> bytes:
    """The good message with another header entry for its features."""
    return frame(json.dumps({**HEADER, "features": {**HEADER["features"], **changes}}).encode(), BODY)


ODD = [None, True, -1, 0, 2.0, 1e300, 10**30, float("nan"), float("inf"), "2", "", [], [2], {}, {"2": 2}]


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_odd_values_in_the_header_are_refused(odd: Any) -> None:
    shape, offsets = HEADER["features"]["shape"], HEADER["features"]["data_offsets"]
    headers = [with_entry(shape=[odd, 3]), with_entry(shape=[2, odd]), with_entry(dtype=odd), with_entry(shape=odd)]
    headers += [with_entry(data_offsets=[odd, offsets[1]]), with_entry(data_offsets=[offsets[0], odd])]
    headers += [with_entry(data_offsets=odd), frame(json.dumps({**HEADER, "features": odd}).encode(), BODY)]
    assert shape == [2, 3]
    for data in headers:
        with pytest.raises(MessageError, match="upload"):
            Upload.from_bytes(data, SCHEMA)


def test_offsets_that_overlap_or_leave_a_gap_are_refused() -> None:
    whole = HEADER["features"]["data_offsets"]
    for offsets in ([0, 24], [whole[0] + 4, whole[1] + 4], [whole[1], whole[0]], [whole[0], whole[1] - 4]):
        if offsets != whole:
            with pytest.raises(MessageError, match="upload is damaged"):
                Upload.from_bytes(with_entry(data_offsets=offsets), SCHEMA)


def test_names_given_twice_are_refused() -> None:
    good = json.dumps(HEADER["features"])
    text = json.dumps(HEADER)
    for other in (good, good.replace("F32", "I32"), good.replace("[2, 3]", "[6, 1]")):
        for name in ('"features"', '"\\u0066eatures"'):
            with pytest.raises(MessageError, match="upload"):
                Upload.from_bytes(frame(("{" + f"{name}: {other}, " + text[1:]).encode(), BODY), SCHEMA)
    for field in ('"dtype": "F32"', '"shape": [2, 3]'):
        twice = text.replace(good, "{" + f"{field}, " + good[1:])
        assert twice != text
        with pytest.raises(MessageError, match="upload"):
            Upload.from_bytes(frame(twice.encode(), BODY), SCHEMA)
    numbers = json.dumps(HEADER["__metadata__"])
    twice = text.replace(numbers, '{"client": "7", ' + numbers[1:])
    assert twice != text
    with pytest.raises(MessageError, match="upload"):
        Upload.from_bytes(frame(twice.encode(), BODY), SCHEMA)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["F32", "I64"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.sampled_from(sorted(HEADER)),
    st.sampled_from([None, "dtype", "shape", "data_offsets", *NUMBERS]),
    JSON,
)
@example("weight", "dtype", [])
@example("features", "shape", ["2", 3])
@settings(max_examples=120, deadline=None)
def test_any_json_anywhere_in_the_header(entry: str, key: str | None, value: Any) -> None:
    header = json.loads(json.dumps(HEADER))
    if key is None:
        header[entry] = value
    else:
        header[entry][key] = value
    accepted_or_refused(frame(json.dumps(header).encode(), BODY))


# ----------------------------------------------------------------- the numbers


def with_numbers(numbers: Any) -> bytes:
    return frame(json.dumps({**HEADER, "__metadata__": numbers}).encode(), BODY)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("text", ["-1", "", " 1", "1 ", "+1", "1.5", "1e3", "0x1", "²", "one", "1" * 19, "9" * 5000])
def test_a_number_that_is_none_is_named(name: str, text: str) -> None:
    with pytest.raises(MessageError, match=f"upload has no valid number '{name}'"):
        Upload.from_bytes(with_numbers({**HEADER["__metadata__"], name: text}), SCHEMA)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_missing_or_negative_number_is_named(name: str) -> None:
    numbers = {key: text for key, text in HEADER["__metadata__"].items() if key != name}
    with pytest.raises(MessageError, match=f"upload has no valid number '{name}' \\(found None\\)"):
        Upload.from_bytes(with_numbers(numbers), SCHEMA)
    negative = Upload(**{**dict.fromkeys(NUMBERS, 1), name: -1}, tensors=tensors())
    with pytest.raises(MessageError, match=f"upload has no valid number '{name}' \\(found '-1'\\)"):
        Upload.from_bytes(negative.to_bytes(), SCHEMA)


def test_metadata_of_another_form_is_refused() -> None:
    without = {name: entry for name, entry in HEADER.items() if name != "__metadata__"}
    with pytest.raises(MessageError, match="no valid number 'client'"):
        Upload.from_bytes(frame(json.dumps(without).encode(), BODY), SCHEMA)
    for numbers in ([], ["1"], "1", 3, None, {"client": 1, "task": 2, "round": 3, "samples": 4}):
        with pytest.raises(MessageError, match="upload"):
            Upload.from_bytes(with_numbers(numbers), SCHEMA)


# ------------------------------------------------------------------ the schema


def test_a_specification_knows_its_largest_size() -> None:
    assert TensorSpec((2, 3)).max_bytes == 24
    assert TensorSpec((AtMost(4), 3), torch.float64).max_bytes == 96
    assert TensorSpec((), torch.int64).max_bytes == 8
    assert TensorSpec((AtMost(4), 3)).largest == (4, 3)


def test_of_an_optional_schema_every_tensor_may_be_missing() -> None:
    schema = optional({"x": TensorSpec((AtMost(2), 3), torch.int64), "y": TensorSpec((), optional=True)})
    assert schema == {
        "x": TensorSpec((AtMost(2), 3), torch.int64, optional=True),
        "y": TensorSpec((), optional=True),
    }
    assert TensorSpec.like(torch.zeros(2, 5, dtype=torch.int32)) == TensorSpec((2, 5), torch.int32)


# ------------------------------------------------------------------- uploads on disk


def test_received_uploads_are_read_at_each_access(tmp_path: Path) -> None:
    received = Received()
    assert not received
    for client in (3, 1):
        file = tmp_path / f"{client}"
        sent = Upload(client, 1, 4, 9, {"x": torch.full((2,), float(client))})
        file.write_bytes(sent.to_bytes())
        received.add(sent, file)
    assert list(received) == [1, 3]  # in whatever order they came
    assert len(received) == 2
    assert 2 not in received
    assert received[1].tensors["x"].tolist() == [1, 1]
    assert [(u.client, u.samples) for u in received.values()] == [(1, 9), (3, 9)]
    (tmp_path / "3").unlink()
    with pytest.raises(FileNotFoundError):
        received[3]


# ------------------------------------------------------ what tensors must be by their meaning


def test_rows_of_unit_length_by_hand() -> None:
    assert unit_rows(torch.tensor([[0.6, 0.8], [0.0, 0.0], [-1.0, 0.0]])) is None  # zeros where there was no length
    assert unit_rows(torch.tensor([[0.6, 0.8], [3.0, 4.0]])) == "has a row of length 5, must be 1"
    assert unit_rows(torch.tensor([[0.06, 0.08]])) == "has a row of length 0.1, must be 1"


def test_what_cannot_be_negative() -> None:
    assert not_negative(torch.tensor([0, 5])) is None
    assert not_negative(torch.tensor([0.5, -0.25])) == "holds -0.25, must not be negative"
    assert not_negative(torch.tensor(2**62)) == "holds 4.61169e+18, must be at most 1e+15"


def test_second_moments_are_symmetric_and_have_no_negative_direction() -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert semidefinite(x.T @ x) is None
    assert semidefinite((x[:1].T @ x[:1]) * 1e14) is None  # of rank one, and large
    assert semidefinite(torch.tensor([[1.0, 0.5], [0.0, 1.0]])) == "is not symmetric"
    assert semidefinite(torch.tensor([[0.0, 1.0], [1.0, 0.0]])) == "has the eigenvalue -1, must not be negative"
    assert semidefinite(torch.zeros(2, 2)) is None


def test_a_rule_is_checked_as_the_message_is_read() -> None:
    schema = {**SCHEMA, "features": TensorSpec((AtMost(4), 3), rule=unit_rows)}
    with pytest.raises(MessageError, match=r"upload: tensor 'features' has a row of length .*, must be 1"):
        Upload.from_bytes(GOOD, schema)
    right = torch.tensor([[1.0, 0.0, 0.0]])
    assert torch.equal(Upload.from_bytes(upload(features=right).to_bytes(), schema).tensors["features"], right)


def test_batch_normalisation_has_rules_without_being_asked() -> None:
    layer = torch.nn.BatchNorm2d(2)
    schema = schema_of({f"cnn.bn.{name}": tensor for name, tensor in layer.state_dict().items()})
    rules = {name.rpartition(".")[2]: spec.rule for name, spec in schema.items()}
    assert rules["running_var"] is rules["num_batches_tracked"] is not_negative
    assert rules["weight"] is rules["running_mean"] is None


def test_truth_values_are_zero_or_one() -> None:
    """torch takes any byte for one, and counts it as what it is."""
    schema = {"kept": TensorSpec((2,), torch.bool)}
    data = Upload(1, 1, 1, 1, {"kept": torch.tensor([True, False])}).to_bytes()
    assert data.endswith(b"\x01\x00") or data.rstrip(b"\x00").endswith(b"\x01")
    place = data.rindex(b"\x01\x00")
    with pytest.raises(MessageError, match="tensor 'kept' holds bytes that are neither true nor false"):
        Upload.from_bytes(data[:place] + b"\x02\x00" + data[place + 2 :], schema)


def test_a_line_is_short_and_can_be_read() -> None:
    assert in_a_line("a\nb\x1b[31mc\u202e") == "a?b?[31mc?"
    assert in_a_line("x" * 10**6) == "x" * 500


def test_names_in_an_error_are_few_and_short() -> None:
    many = {f"{n}{'y' * 5000}": torch.zeros(1) for n in range(40)}
    with pytest.raises(MessageError) as caught:
        Upload.from_bytes(Upload(1, 2, 3, 40, {**tensors(), **many}).to_bytes(), {**SCHEMA, "z": TensorSpec((10**6,))})
    assert len(str(caught.value)) <= 500
    assert "and 37 more" in str(caught.value)
