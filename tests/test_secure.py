"""The protocol of secure sums alone: shares, fixed point, masks, clients that drop out, and hostile ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import pytest
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from sympy import interpolate, isprime, symbols
from torch import Tensor

from fedlscl.federation.secure import masks, shamir, words
from fedlscl.federation.secure.fixed_point import decode, encode, largest, most_bits
from fedlscl.federation.secure.party import Party
from fedlscl.federation.secure.session import NoSum, Session
from fedlscl.messages import MessageError, TensorSpec
from fedlscl.schedule import Round

ROUND = Round(1, 3, False, 0)
SHAPES = {"a": torch.Size((2, 3)), "n": torch.Size(())}


def values(client: int) -> dict[str, Tensor]:
    return {"a": torch.arange(6.0).reshape(2, 3) * (client + 1) - 7.3, "n": torch.tensor(10 * client + 1)}


Change = Callable[[bytes], bytes | None]
"""What becomes of a client's reply; None where it does not come."""


@dataclass
class Run:
    """A session in which replies can be lost or changed, by client and step."""

    clients: tuple[int, ...] = (0, 1, 2, 4, 7)
    threshold: int = 3
    changes: Mapping[tuple[int, str], Change] = field(default_factory=dict)
    values: Callable[[int], Mapping[str, Tensor]] = values
    bits: tuple[int, ...] = (30, 30)

    def __post_init__(self) -> None:
        self.session = Session(self.clients, ROUND, self.threshold, self.bits, SHAPES)
        self.parties = {client: Party(client, ROUND) for client in self.clients}
        self.left_out: dict[int, str] = {}
        self.sent: dict[tuple[int, str], bytes] = {}

    def step(
        self,
        name: str,
        messages: Mapping[int, bytes],
        answer: Callable[[int, bytes], bytes],
        take: Callable[[int, bytes], None],
    ) -> None:
        for client, message in messages.items():
            try:
                self.sent[client, name] = answer(client, message)
                reply = self.changes.get((client, name), bytes)(self.sent[client, name])
                if reply is not None:
                    take(client, reply)
            except ValueError as error:
                self.left_out[client] = str(error)

    def until_masked(self) -> None:
        session, parties = self.session, self.parties
        self.step("advertise", session.invitations(), lambda c, m: parties[c].advertise(m), session.advertised)
        self.step("share", session.rosters(), lambda c, m: parties[c].share(m), session.shared)
        self.step("mask", session.deliveries(), lambda c, m: parties[c].mask(m, self.values(c)), session.masked)

    def total(self) -> dict[str, Tensor]:
        self.until_masked()
        session, parties = self.session, self.parties
        self.step("unmask", session.requests(), lambda c, m: parties[c].unmask(m), session.revealed)
        return session.total()


def check(total: Mapping[str, Tensor], clients: tuple[int, ...]) -> None:
    for name in SHAPES:
        exact = torch.stack([values(client)[name].double() for client in clients]).sum(0)
        torch.testing.assert_close(total[name], exact, rtol=0, atol=len(clients) * 2.0**-31)
    assert int(total["n"]) == sum(10 * client + 1 for client in clients)


def tensors_of(message: bytes) -> Mapping[str, Tensor]:
    schema = {name: TensorSpec.like(tensor) for name, tensor in load(message).items()}
    return words.Secure.from_bytes(message, schema).tensors


def changed(message: bytes, client: int = 2, **tensors: Tensor) -> bytes:
    """A client's message with other tensors, as an attacker would write it."""
    return words.Secure(client, ROUND.task, ROUND.number, 0, {**tensors_of(message), **tensors}).to_bytes()


# ---- shares


def test_the_field_is_one_and_holds_every_secret() -> None:
    assert isprime(shamir.PRIME)
    assert 2 ** (8 * shamir.SECRET) < shamir.PRIME < 2 ** (8 * shamir.SHARE)


@settings(max_examples=20, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 6), st.data())
def test_any_shares_up_to_the_threshold_give_the_secret(secret: bytes, threshold: int, data: st.DataObject) -> None:
    holders = data.draw(st.lists(st.integers(0, 1000), min_size=threshold, max_size=9, unique=True))
    shares = dict(zip(holders, shamir.split(secret, holders, threshold), strict=True))
    chosen = data.draw(st.permutations(holders))[:threshold]
    assert shamir.combine({holder: shares[holder] for holder in chosen}) == secret
    if threshold > 1:
        assert shamir.combine({holder: shares[holder] for holder in chosen[1:]}) != secret


def test_shares_are_points_of_a_polynomial_through_the_secret() -> None:
    secret, holders = bytes(range(32)), [0, 3, 4, 8]
    points = [(h + 1, int.from_bytes(s)) for h, s in zip(holders, shamir.split(secret, holders, 3), strict=True)]
    x = symbols("x")
    for three in combinations(points, 3):
        at_zero = interpolate(list(three), x).subs(x, 0)  # over the rationals, by another program
        assert at_zero.p * pow(int(at_zero.q), -1, shamir.PRIME) % shamir.PRIME == int.from_bytes(secret)


def test_secrets_are_shared_differently_each_time() -> None:
    assert shamir.split(bytes(32), [0, 1], 2) != shamir.split(bytes(32), [0, 1], 2)


# ---- fixed point


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.floats(-1e5, 1e5), min_size=3, max_size=3), min_size=1, max_size=9), st.integers(8, 36))
def test_a_sum_in_fixed_point_is_the_sum(rows: list[list[float]], bits: int) -> None:
    tensors = [{"x": torch.tensor(row, dtype=torch.float64)} for row in rows]
    total = np.zeros(3, np.uint64)
    for tensor in tensors:
        total += encode(tensor, [bits], len(rows))
    found = decode(total, [bits], {"x": torch.Size((3,))})["x"]
    exact = torch.stack([tensor["x"] for tensor in tensors]).sum(0)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=len(rows) * 2.0 ** -(bits + 1))


@pytest.mark.parametrize("clients", [1, 2, 3, 7, 500])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_values_add_up_without_wrapping(clients: int, sign: int) -> None:
    limit = largest(30, clients)
    below = torch.tensor([sign * float(np.nextafter(limit, 0))], dtype=torch.float64)
    total = sum(int(encode({"x": below}, [30], clients).view(np.int64)[0]) for _ in range(clients))
    assert -(2**63) <= total < 2**63
    with pytest.raises(ValueError, match=r"'x' holds .*, but a secure sum over .* takes values below .*; take fede"):
        encode({"fine": torch.zeros(2), "x": torch.tensor([sign * limit], dtype=torch.float64)}, [30, 30], clients)


def test_the_bits_that_an_error_names_are_the_most_that_hold_the_value() -> None:
    with pytest.raises(ValueError, match=r"take federation\.fraction_bits 21$"):
        encode({"x": torch.tensor([2.0**40])}, [30], 2)
    encode({"x": torch.tensor([2.0**40])}, [21], 2)
    with pytest.raises(ValueError, match="takes values below"):
        encode({"x": torch.tensor([2.0**40])}, [22], 2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"'x' holds (nan|inf)"):
        encode({"x": torch.tensor([1.0, value])}, [30], 3)


@given(st.integers(1, 5000), st.integers(1, 10**6))
def test_what_has_the_most_bits_fits_and_would_not_with_another(clients: int, factor: int) -> None:
    bits = most_bits(clients, factor)
    assert largest(bits, clients) >= factor * 256
    assert bits == 52 or largest(bits + 1, clients) < factor * 256


@pytest.mark.parametrize(
    ("clients", "images", "bits"),
    [(5, 1, 52), (5, 100, 46), (5, 1000, 42), (50, 100, 42), (500, 1, 46), (500, 100, 39), (500, 1000, 36)],
)
def test_a_mean_of_what_was_learned_is_the_exact_one_rounded_once(clients: int, images: int, bits: int) -> None:
    """And the largest values are in range, whatever the weights; tiny ones are not exact."""
    assert most_bits(clients, images) == bits
    rng = np.random.default_rng(bits)
    exponents = rng.uniform(23 - bits, 8, (clients, 50))
    values = np.float32(rng.choice([-1, 1], (clients, 50)) * 2**exponents)
    values[:, 0], values[:, 1], values[:, 2] = np.nextafter(np.float32(256), np.float32(0)), -255.99, 0
    weights = rng.integers(1, images + 1, clients)
    weights[0] = images
    shapes, total = {"x": torch.Size((50,))}, np.zeros(50, np.uint64)
    for weight, row in zip(weights.tolist(), values, strict=True):
        total += encode({"x": torch.from_numpy(row).double() * weight}, [bits], clients)
    found = (decode(total, [bits], shapes)["x"] / int(weights.sum())).float()
    terms = values.astype(np.float64) * weights[:, None]
    exact = [math.fsum(column) / int(weights.sum()) for column in terms.T]
    assert found.tolist() == [float(np.float32(mean)) for mean in exact]


def test_each_tensor_has_its_own_bits() -> None:
    """The small values of one and the large ones of another, both exact."""
    small = torch.full((2, 3), 2.0**-50)
    run = Run(values=lambda client: {"a": (client + 1) * small, "n": torch.tensor(2**40 + client)}, bits=(50, 10))
    total = run.total()
    assert torch.equal(total["a"], (19 * small).double())
    assert int(total["n"]) == 5 * 2**40 + 14


# ---- masks


def test_a_mask_is_the_key_stream_of_rfc_8439() -> None:
    """Of section 2.3.2, whose counter and nonce are others: by the block function, written out."""
    key = bytes(range(32))
    vector = np.zeros(8 * 3, np.uint64)
    masks.add_mask(vector, key, 1)
    assert vector.astype("<u8").tobytes() == b"".join(block(key, counter) for counter in range(3))
    # the first block with its nonce and counter is the published one
    expected = "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
    assert block(key, 1, bytes.fromhex("000000090000004a00000000"))[:32].hex() == expected


COLUMNS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
DIAGONALS = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))


def block(key: bytes, counter: int, nonce: bytes = bytes(12)) -> bytes:
    """ChaCha20's block function (RFC 8439, section 2.3)."""
    text = b"expand 32-byte k" + key + counter.to_bytes(4, "little") + nonce
    start = [int.from_bytes(text[n : n + 4], "little") for n in range(0, 64, 4)]
    s = start.copy()
    for a, b, c, d in 10 * (*COLUMNS, *DIAGONALS):
        for x, y, z, left in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            s[x] = (s[x] + s[y]) % 2**32
            turned = s[z] ^ s[x]
            s[z] = (turned << left | turned >> (32 - left)) % 2**32
    return b"".join(((x + y) % 2**32).to_bytes(4, "little") for x, y in zip(s, start, strict=True))


@pytest.mark.parametrize("size", [1, 2**15 - 1, 2**15, 2**15 + 1, 2**16 + 3])
def test_a_mask_comes_off_whatever_its_size(size: int) -> None:
    vector = np.arange(size, dtype=np.uint64)
    masks.add_mask(vector, bytes(32), 1)
    assert size == 1 or not np.array_equal(vector[-2:], np.arange(size - 2, size, dtype=np.uint64))
    masks.add_mask(vector, bytes(32), -1)
    assert np.array_equal(vector, np.arange(size, dtype=np.uint64))


def test_two_clients_agree_on_keys_that_depend_on_session_and_purpose() -> None:
    one, two = bytes([1] * 32), bytes([2] * 32)
    keys = {
        masks.agreed_key(mine, masks.public_of(other), session, purpose)
        for session, purpose in ((b"s", b"mask"), (b"s", b"channel"), (b"t", b"mask"))
        for mine, other in ((one, two), (two, one))
    }
    assert len(keys) == 3


def test_what_is_sealed_opens_for_its_receiver_alone() -> None:
    message = masks.sealed(bytes(32), b"share", 3, 5)
    assert masks.opened(bytes(32), message, 3, 5) == b"share"
    assert ChaCha20Poly1305(bytes(32)).decrypt(bytes([0, 0, 0, 3, 0, 0, 0, 5, 0, 0, 0, 0]), message, None) == b"share"
    for key, sender, receiver in ((bytes(32), 5, 3), (bytes([1] * 32), 3, 5)):
        with pytest.raises(InvalidTag):
            masks.opened(key, message, sender, receiver)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 200), st.data())
def test_the_check_of_a_sum_is_the_sum_of_the_checks_and_shows_any_change(size: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(size)
    rows = rng.integers(0, 2**63, (3, size)).astype(np.uint64)
    total = np.zeros(masks.length(size), np.uint64)
    for row in rows:
        total += masks.checked(row)
    assert masks.holds(total)
    assert np.array_equal(total[:size], rows[0] + rows[1] + rows[2])
    at, change = data.draw(st.integers(0, size)), data.draw(st.integers(1, 2**64 - 1))
    total[at] = (int(total[at]) + change) % 2**64
    assert not masks.holds(total)


# ---- the protocol


def test_the_sum_is_that_of_all_clients() -> None:
    check(Run().total(), (0, 1, 2, 4, 7))


@pytest.mark.parametrize("step", ["advertise", "share", "mask", "unmask"])
@pytest.mark.parametrize("gone", [(1,), (0, 7)])
def test_clients_may_drop_out_in_every_step(step: str, gone: tuple[int, ...]) -> None:
    run = Run(changes={(client, step): lambda message: None for client in gone})
    total = run.total()
    left = (0, 1, 2, 4, 7) if step == "unmask" else tuple(c for c in (0, 1, 2, 4, 7) if c not in gone)
    assert run.session.survivors == left
    check(total, left)


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_whoever_drops_out_when_the_sum_is_right_or_there_is_none(data: st.DataObject) -> None:
    steps = ("advertise", "share", "mask", "unmask", "")
    clients = tuple(range(data.draw(st.integers(3, 6))))
    gone = {client: data.draw(st.sampled_from(steps)) for client in clients}
    threshold = data.draw(st.integers(len(clients) // 2 + 1, len(clients)))
    run = Run(clients, threshold, {(c, step): lambda message: None for c, step in gone.items() if step})
    arrived = tuple(client for client in clients if gone[client] in ("unmask", ""))
    if sum(not step for step in gone.values()) >= threshold:
        check(run.total(), arrived)
    else:
        with pytest.raises(NoSum, match=rf"\d clients .*, must be at least {threshold}$"):
            run.total()


def test_the_same_values_are_never_sent_alike_and_have_the_same_sum() -> None:
    runs = [Run(), Run()]
    totals = [run.total()["a"] for run in runs]
    sent = [tensors_of(run.sent[0, "mask"])["masked"] for run in runs]
    assert not bool((sent[0] == sent[1]).any())
    assert torch.equal(*totals)


def test_the_server_sees_uniform_numbers_and_nothing_else() -> None:
    """Whatever a client sends, zeros here, every bit of it is as often 0 as 1."""
    run = Run(values=lambda client: {"a": torch.zeros(2, 3), "n": torch.tensor(0)})
    run.until_masked()
    for client in run.clients:
        masked = tensors_of(run.sent[client, "mask"])["masked"].numpy().view(np.uint8)
        ones = int(np.unpackbits(masked).sum())
        bits = 8 * len(masked)
        assert abs(ones - bits / 2) < 6 * (bits / 4) ** 0.5


# ---- hostile clients


def test_values_without_a_mask_are_thrown_away() -> None:
    plain = torch.from_numpy(masks.checked(encode(values(2), [30, 30], 5)).view(np.int64))
    run = Run(changes={(2, "mask"): lambda message: changed(message, masked=plain)})
    check(run.total(), (0, 1, 4, 7))
    assert run.left_out == {2: "values that are under no mask; they were thrown away"}


def test_values_of_another_size_are_refused() -> None:
    run = Run(changes={(2, "mask"): lambda message: changed(message, masked=torch.zeros(5, dtype=torch.int64))})
    check(run.total(), (0, 1, 4, 7))
    assert "has shape (5,), expected (129)" in run.left_out[2]


@pytest.mark.parametrize("step", ["advertise", "share", "mask"])
def test_what_was_sent_before_is_refused(step: str) -> None:
    before = Run()
    before.until_masked()
    run = Run(changes={(2, step): lambda message: before.sent[2, step]})
    check(run.total(), (0, 1, 4, 7))
    assert "is of another session than this, perhaps sent before" in run.left_out[2]


def test_values_that_were_sent_before_under_a_new_name_give_no_sum() -> None:
    before = Run()
    before.until_masked()
    old = tensors_of(before.sent[2, "mask"])["masked"]
    with pytest.raises(NoSum, match="the masks do not cancel"):
        Run(changes={(2, "mask"): lambda message: changed(message, masked=old)}).total()


def test_a_part_without_its_mask_gives_no_sum() -> None:
    def half(message: bytes) -> bytes:
        return changed(message, masked=tensors_of(message)["masked"] * (torch.arange(129) != 3))

    with pytest.raises(NoSum, match="the masks do not cancel"):
        Run(changes={(2, "mask"): half}).total()


def test_a_share_of_shares_that_was_sent_before_counts_for_nothing() -> None:
    before = Run()
    before.total()
    run = Run(changes={(c, "unmask"): lambda message, c=c: before.sent[c, "unmask"] for c in (1, 2)})
    check(run.total(), (0, 1, 2, 4, 7))  # three are enough
    assert set(run.left_out) == {1, 2}
    with pytest.raises(NoSum, match="2 clients have helped to take the masks off, must be at least 3"):
        Run(changes={(c, "unmask"): lambda message, c=c: before.sent[c, "unmask"] for c in (1, 2, 4)}).total()


@pytest.mark.parametrize("row", [0, 1])
def test_a_point_that_everybody_agrees_with_is_no_key(row: int) -> None:
    def weak(message: bytes) -> bytes:
        keys = tensors_of(message)["keys"].clone()
        keys[row] = 0
        return changed(message, keys=keys)

    run = Run(changes={(2, "advertise"): weak})
    check(run.total(), (0, 1, 4, 7))
    assert run.left_out == {2: "a public key is none: with it everybody would agree on the same key"}


def test_the_keys_of_another_are_refused() -> None:
    run = Run()
    run.changes = {
        (2, "advertise"): lambda message: changed(message, keys=tensors_of(run.sent[0, "advertise"])["keys"])
    }
    check(run.total(), (0, 1, 4, 7))
    assert run.left_out[2] == "a public key is there twice, or that of another client"


def test_keys_that_are_not_the_client_s_own_leave_it_out_by_itself() -> None:
    """As a server would that gives it, and others, keys of its own."""
    stranger = words.rows_of([masks.public_of(bytes([8] * 32)), masks.public_of(bytes([9] * 32)), bytes(32)])
    run = Run(changes={(2, "advertise"): lambda message: changed(message, keys=stranger)})
    check(run.total(), (0, 1, 4, 7))
    assert run.left_out[2] == "the list of clients has other keys of this client than its own"


@pytest.mark.parametrize("wrong", [lambda x: torch.zeros_like(x), lambda x: x.flip(0)])
def test_shares_that_nobody_can_open_give_no_sum(wrong: Callable[[Tensor], Tensor]) -> None:
    def spoil(message: bytes) -> bytes:
        return changed(message, sealed=wrong(tensors_of(message)["sealed"]))

    with pytest.raises(
        NoSum, match=r"[01] of 5 clients could open what client 2 has sealed for them, must be at least 3"
    ):
        Run(changes={(2, "share"): spoil}).total()


def test_shares_of_another_secret_give_no_sum() -> None:
    run = Run()
    share = run.parties[2].share

    def other(message: bytes) -> bytes:
        secret = run.parties[2]._kept["secrets"]
        run.parties[2]._kept["secrets"] = torch.stack([secret[0], secret[1], secret[2] + 1])
        reply = share(message)
        run.parties[2]._kept["secrets"] = secret
        return reply

    run.parties[2].share = other  # type: ignore[method-assign]
    with pytest.raises(NoSum, match="the shares of client 2's seed do not lead to what it has advertised"):
        run.total()


def wrong_shares(message: bytes) -> bytes:
    return changed(message, 1, shares=tensors_of(message)["shares"] + 1)


def test_one_client_s_wrong_shares_are_found_where_there_are_enough_others(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(changes={(1, "unmask"): wrong_shares, (2, "mask"): lambda message: None})
    check(run.total(), (0, 1, 4, 7))
    assert "client 1 has given a wrong share of client 2's secret" in caplog.text
    with pytest.raises(NoSum, match="the shares of client 0's seed do not lead to what it has advertised"):
        Run(threshold=5, changes={(1, "unmask"): wrong_shares}).total()


def test_a_client_is_heard_once_and_for_itself() -> None:
    run = Run()
    run.until_masked()
    with pytest.raises(MessageError, match="that nobody has asked for, or asked for a second time"):
        run.session.masked(0, run.sent[0, "mask"])
    with pytest.raises(MessageError, match="claims to be of client 1, round 3, task 1"):
        run.session.advertised(0, run.sent[1, "advertise"])


def test_a_client_with_other_tensors_is_left_out() -> None:
    """In another order, say: the sum would be one of other things."""
    run = Run(values=lambda client: dict(reversed(values(client).items())) if client == 2 else values(client))
    check(run.total(), (0, 1, 4, 7))
    assert run.left_out == {2: "the server adds up tensors of other names or shapes than this client has"}


# ---- what a client refuses


def test_a_client_gives_away_one_share_of_each_and_once() -> None:
    run = Run()
    run.until_masked()
    requests = run.session.requests()
    fewer = changed(requests[0], 0, survivors=torch.tensor([0, 1, 2]))
    given = tensors_of(run.parties[0].unmask(requests[0]))["shares"]
    assert given.shape == (5, 33)
    with pytest.raises(MessageError, match="'unmask' of a secure sum is asked for out of its order, or twice"):
        run.parties[0].unmask(fewer)
    assert set(run.parties[0].state()) == {"done"}  # it has forgotten its secrets


def test_a_client_masks_one_vector() -> None:
    run = Run()
    run.until_masked()
    with pytest.raises(MessageError, match="'mask' of a secure sum is asked for out of its order, or twice"):
        run.parties[0].mask(run.session.deliveries()[0], values(0))


@pytest.mark.parametrize("survivors", [[0, 1], [1, 2, 4], [0, 1, 2, 3]])
def test_a_client_helps_with_no_sum_of_too_few_or_of_strangers(survivors: list[int]) -> None:
    run = Run()
    run.until_masked()
    request = changed(run.session.requests()[0], 0, survivors=torch.tensor(survivors))
    with pytest.raises(MessageError, match="clients have arrived, too few, or not this one, or strangers"):
        run.parties[0].unmask(request)


@pytest.mark.parametrize("threshold", [2, 6])
def test_a_client_refuses_a_threshold_that_half_of_the_clients_reach(threshold: int) -> None:
    run = Run()
    session = run.session
    run.step("advertise", session.invitations(), lambda c, m: run.parties[c].advertise(m), session.advertised)
    roster = changed(session.rosters()[0], 0, threshold=torch.tensor(threshold))
    with pytest.raises(MessageError, match=f"threshold is {threshold}, must be more than half of the 5 clients"):
        run.parties[0].share(roster)


@pytest.mark.parametrize("bits", [[30, 0], [53, 30]])
def test_a_client_refuses_bits_that_there_are_not(bits: list[int]) -> None:
    run = Run()
    session = run.session
    run.step("advertise", session.invitations(), lambda c, m: run.parties[c].advertise(m), session.advertised)
    roster = changed(session.rosters()[0], 0, bits=torch.tensor(bits))
    with pytest.raises(MessageError, match=r"^(0|53) bits behind the point, must be from 1 to 52$"):
        run.parties[0].share(roster)


def test_a_client_refuses_bits_of_other_tensors_than_it_has() -> None:
    run = Run(bits=(30, 30, 30))
    with pytest.raises(NoSum, match="0 clients have sent values"):
        run.total()
    assert set(run.left_out.values()) == {"the server says how many bits 3 tensors have, of 2"}


def test_a_party_goes_on_from_its_state() -> None:
    run = Run()

    def again(client: int) -> Party:
        run.parties[client] = Party.restored(client, ROUND, run.parties[client].state())
        return run.parties[client]

    session = run.session
    run.step("advertise", session.invitations(), lambda c, m: run.parties[c].advertise(m), session.advertised)
    run.step("share", session.rosters(), lambda c, m: again(c).share(m), session.shared)
    run.step("mask", session.deliveries(), lambda c, m: again(c).mask(m, values(c)), session.masked)
    run.step("unmask", session.requests(), lambda c, m: again(c).unmask(m), session.revealed)
    check(session.total(), run.clients)
