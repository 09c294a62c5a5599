"""Tests of fedlscl.splits: the rules of the protocol hold for any spec, labels and seed."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlscl.data.dealing import make_split
from fedlscl.data.splits import ADDED, Split, SplitSpec

PAPER_TRAIN = np.repeat(np.arange(100), 50)
PAPER_TEST = np.repeat(np.arange(100), 4)
SMALL = SplitSpec(clients=2, tasks=2, classes_per_task=2, private_classes=2, public_classes=2)
COMMON: dict[str, Any] = {"private_classes": 0, "public_classes": 40, "task_order": "common"}
SMALL_TRAIN, SMALL_TEST = np.repeat(np.arange(6), 20), np.repeat(np.arange(6), 5)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, SplitSpec, int]:
    """Shuffled labels with spare classes, a spec that they allow, and a seed."""
    clients, tasks, per_task = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    private = draw(st.integers(0, tasks * per_task))
    spec = SplitSpec(
        clients=clients,
        tasks=tasks,
        classes_per_task=per_task,
        private_classes=private,
        public_classes=tasks * per_task - private,
        dirichlet_alpha=draw(st.sampled_from([0.1, 1.0, 10.0])),
        min_public_images=draw(st.integers(4, 5)),
        train_per_class=draw(st.sampled_from([None, 20, 23])),
        test_per_class=draw(st.sampled_from([None, 1, 3])),
        local_test=draw(st.sampled_from(["official", "holdout30"])),
    )
    classes = clients * private + spec.public_classes + draw(st.integers(0, 2))
    shuffle = np.random.default_rng(draw(st.integers(0, 100)))
    train = shuffle.permutation(np.repeat(np.arange(classes), shuffle.integers(20, 40, classes)))
    test = shuffle.permutation(np.repeat(np.arange(classes), shuffle.integers(1, 5, classes)))
    return train, test, spec, draw(st.integers(0, 2**64))


@settings(max_examples=120, deadline=None)
@given(cases())
def test_every_rule_of_the_protocol_holds(case: tuple[np.ndarray, np.ndarray, SplitSpec, int]) -> None:
    train, test, spec, seed = case
    split = make_split(train, test, spec, seed)
    holdout = spec.local_test == "holdout30"
    assert split.evaluate_on == ("train" if holdout else "test")
    assert len(split.clients) == spec.clients

    public = set(split.clients[0].public)
    private = [label for client in split.clients for label in client.private]
    assert len(private) == len(set(private)) == spec.clients * spec.private_classes
    assert not public & set(private)

    used: Counter[int] = Counter()
    for client in split.clients:
        assert set(client.public) == public
        assert len(client.tasks) == spec.tasks
        order = [label for task in client.tasks for label in task.classes]
        assert sorted(order) == sorted(client.private + client.public)
        for task in client.tasks:
            assert len(task.classes) == spec.classes_per_task
            for indices in (task.train, task.test):
                assert indices.dtype == np.int64
                assert indices.tolist() == sorted(set(indices.tolist()))
            assert set(train[task.train]) <= set(task.classes)
            used.update(task.train.tolist())
            if holdout:
                used.update(task.test.tolist())
            for label in task.classes:
                fit = int((train[task.train] == label).sum())
                if holdout:
                    tested = int((train[task.test] == label).sum())
                    assert tested == int(0.3 * (fit + tested) + 0.5)
                else:
                    tested, pool = int((test[task.test] == label).sum()), int((test == label).sum())
                    assert tested == min(pool, spec.test_per_class or pool)
                    assert set(test[task.test]) == set(task.classes)
                if label in public:
                    assert fit + (tested if holdout else 0) >= spec.min_public_images

    assert max(used.values()) == 1  # no training image is used twice, by anybody
    per_class = Counter(train[list(used)].tolist())
    pools = {label: int((train == label).sum()) for label in public | set(private)}
    assert per_class == {label: min(n, spec.train_per_class or n) for label, n in pools.items()}


@settings(max_examples=30, deadline=None)
@given(cases())
def test_json_round_trip_and_purity(case: tuple[np.ndarray, np.ndarray, SplitSpec, int]) -> None:
    train, test, spec, seed = case
    before = train.copy()
    np.random.seed(1)
    first = make_split(train, test, spec, seed)
    np.random.seed(2)
    again = make_split(train.astype(np.uint8), test.astype(np.int32), spec, seed)
    assert first.sha256 == again.sha256
    np.testing.assert_array_equal(train, before)

    back = Split.from_json(first.to_json())
    assert back.sha256 == first.sha256
    assert back.spec == spec
    assert back.seed == seed
    ours, theirs = back.clients[-1].tasks[-1], first.clients[-1].tasks[-1]
    assert ours.classes == theirs.classes
    np.testing.assert_array_equal(ours.train, theirs.train)
    assert ours.train.dtype == np.int64


def test_defaults_are_the_papers_cifar100_setting() -> None:
    split = make_split(np.repeat(np.arange(100), 500), np.repeat(np.arange(100), 100), SplitSpec(), 42)
    assert sum(task.train.size for client in split.clients for task in client.tasks) == 50_000
    assert {task.test.size for client in split.clients for task in client.tasks} == {800}
    shares = [np.isin(task.train // 500, client.public).sum() for client in split.clients for task in client.tasks]
    assert sum(shares) == 25 * 500
    assert split.clients[0].tasks[0].classes != split.clients[1].tasks[0].classes


def test_hash_is_fixed_for_good() -> None:
    # Recorded results name this hash. If it changes, equal seeds give other splits than before.
    split = make_split(SMALL_TRAIN, SMALL_TEST, SMALL, 42)
    assert split.sha256 == "9c965270f0b75f47cda33242af3be3b6f6c54e825f11ddbbcd50ec42ef9de66c"


def test_hash_follows_everything_that_matters() -> None:
    def digest(seed: int = 0, train: np.ndarray = SMALL_TRAIN, **changes: object) -> str:
        return make_split(train, SMALL_TEST, replace(SMALL, **changes), seed).sha256  # type: ignore[arg-type]

    variants = [
        digest(),
        digest(seed=1),
        digest(train=SMALL_TRAIN[::-1]),
        digest(dirichlet_alpha=50.0),
        digest(min_public_images=5),
        digest(train_per_class=15),
        digest(test_per_class=2),
        digest(local_test="holdout30"),
        digest(tasks=1, classes_per_task=4),
    ]
    assert len(set(variants)) == len(variants)
    assert digest(dirichlet_alpha=1) == digest()


def _shares(spec: SplitSpec, seed: int = 3) -> dict[tuple[int, int], set[int]]:
    """Training images by (client, class)."""
    split = make_split(PAPER_TRAIN, PAPER_TEST, spec, seed)
    return {
        (i, label): set(task.train[PAPER_TRAIN[task.train] == label].tolist())
        for i, client in enumerate(split.clients)
        for task in client.tasks
        for label in task.classes
    }


def test_changing_one_setting_leaves_the_rest_alone() -> None:
    base = _shares(SplitSpec())
    assert _shares(SplitSpec(tasks=4, classes_per_task=10)) == base
    assert _shares(SplitSpec(test_per_class=1)) == base
    capped = _shares(SplitSpec(train_per_class=40))
    public = set(make_split(PAPER_TRAIN, PAPER_TEST, SplitSpec(), 3).clients[0].public)
    assert all(capped[key] < images for key, images in base.items() if key[1] not in public)
    # One client fewer: the others keep their private classes and images.
    fewer = _shares(SplitSpec(clients=4))
    assert all(fewer[key] == base[key] for key in fewer if key[1] not in public)
    assert {key for key in fewer if key[1] not in public} == {k for k in base if k[0] < 4 and k[1] not in public}
    skewed = _shares(SplitSpec(dirichlet_alpha=0.5, min_public_images=1))
    assert all(skewed[key] == base[key] for key in base if key[1] not in public)


def test_a_large_alpha_shares_equally_and_a_small_one_does_not() -> None:
    def sizes(alpha: float) -> np.ndarray:
        spec = SplitSpec(private_classes=0, public_classes=40, dirichlet_alpha=alpha, min_public_images=1)
        shares = _shares(spec)
        return np.array([len(images) for images in shares.values()])

    assert sizes(1e9).min() == sizes(1e9).max() == 10  # 50 images over 5 clients
    assert np.median(sizes(0.05)) == 1
    assert sizes(0.05).max() > 40


def test_dirichlet_shares_have_the_expected_spread() -> None:
    # Shares of a Dirichlet(1, 1, 1, 1, 1): mean 1/5, variance (1/5)(4/5)/6.
    labels = np.repeat(np.arange(40), 1000)
    spec = SplitSpec(private_classes=0, public_classes=40)
    split = make_split(labels, np.arange(40), spec, 0)
    shares = np.array(
        [np.bincount(labels[np.concatenate([t.train for t in c.tasks])], minlength=40) for c in split.clients]
    )
    np.testing.assert_array_equal(shares.sum(0), 1000)
    assert np.var(shares / 1000) == pytest.approx(0.8 / 5 / 6, rel=0.25)


def test_the_order_of_tasks_is_each_clients_own() -> None:
    spec = SplitSpec(private_classes=0, public_classes=40, dirichlet_alpha=100)
    orders = {
        tuple(task.classes for task in client.tasks) for client in make_split(PAPER_TRAIN, PAPER_TEST, spec, 0).clients
    }
    assert len(orders) == 5


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 2**64))
def test_a_common_order_of_tasks_is_that_of_all_clients(data: st.DataObject, seed: int) -> None:
    clients, tasks, per_task = (data.draw(st.integers(1, n)) for n in (5, 3, 4))
    held = data.draw(st.none() | st.integers(-(-per_task // clients), per_task))
    dealt: dict[str, Any] = {"task_order": "common", "classes_per_client": held}
    spec = SplitSpec(clients, tasks, per_task, 0, tasks * per_task, 1.0, 2, **dealt)
    train, test = np.tile(np.arange(14), 31), np.arange(14)
    split = make_split(train, test, spec, seed)

    assert [len(classes) for classes in split.federation] == [per_task] * tasks
    assert len({label for classes in split.federation for label in classes}) == tasks * per_task
    for n, classes in enumerate(split.federation):
        of_task = [client.tasks[n] for client in split.clients]
        assert {label for task in of_task for label in task.classes} == set(classes)
        assert {len(task.classes) for task in of_task} == {held or per_task}
        for label in classes:
            shares = [int((train[task.train] == label).sum()) for task in of_task if label in task.classes]
            assert sum(shares) == 31  # all images of the class, each once: the split checks that none is used twice
            if held is None:
                assert len(shares) == clients
            else:
                assert max(shares) - min(shares) <= 1
                assert len(shares) in (clients * held // per_task, -(-clients * held // per_task))
    assert {client.private for client in split.clients} == {()}
    assert Split.from_json(split.to_json()).sha256 == split.sha256


def test_a_common_order_deals_the_classes_anew_in_each_task() -> None:
    spec = SplitSpec(**COMMON, classes_per_client=2)
    split = make_split(PAPER_TRAIN, PAPER_TEST, spec, 0)
    partners = []
    for n, classes in enumerate(split.federation):
        held = {i: set(client.tasks[n].classes) for i, client in enumerate(split.clients)}
        partners.append({(i, k) for i in held for k in held if i < k and held[i] & held[k]})
        assert set().union(*held.values()) == set(classes)
    assert len(set(map(frozenset, partners))) > 1  # not always the same clients share their classes
    other = make_split(PAPER_TRAIN, PAPER_TEST, spec, 1)
    assert split.federation != other.federation


@pytest.mark.parametrize("order", ["own", "common"])
def test_tasks_may_have_different_numbers_of_classes(order: str) -> None:
    equal = SplitSpec(**{**COMMON, "task_order": order})
    sizes = (20, 5, 5, 5, 5)
    first, then = (
        make_split(PAPER_TRAIN, PAPER_TEST, spec, 0) for spec in (replace(equal, classes_per_task=sizes), equal)
    )
    for ours, theirs in zip(first.clients, then.clients, strict=True):
        assert [len(task.classes) for task in ours.tasks] == list(sizes)
        late = {label for task in ours.tasks[1:3] for label in task.classes}  # classes 20 to 29 of the same order
        assert late <= {label for task in theirs.tasks[2:4] for label in task.classes}
    assert Split.from_json(first.to_json()).spec == replace(equal, classes_per_task=sizes)
    same = make_split(PAPER_TRAIN, PAPER_TEST, replace(equal, classes_per_task=(8,) * 5), 0)
    assert same.federation == then.federation


def test_patterns_of_names_say_whose_a_class_is() -> None:
    names = [f"{domain}_{label}" for domain in ("paint", "photo", "sketch") for label in "abc"]
    train, test = np.repeat(np.arange(9), 20), np.repeat(np.arange(9), 5)
    spec = SplitSpec(3, 1, 3, 3, 0, private_names=("sketch_*", "paint_*", "photo_?"))
    for seed in range(3):
        split = make_split(train, test, spec, seed, names)
        assert [client.private for client in split.clients] == [(6, 7, 8), (0, 1, 2), (3, 4, 5)]
    two = make_split(train, test, SplitSpec(2, 1, 6, 3, 3, private_names=("paint_*", "photo_*")), 0, names)
    assert {client.public for client in two.clients} == {(6, 7, 8)}  # public classes are drawn among the others
    assert Split.from_json(two.to_json()).sha256 == two.sha256
    for patterns, message in (
        (
            ("p*", "photo_*", "sketch_*"),
            r"'p\*' of client 0 fits 6 classes: paint_a, .*; it must fit 3 .* of 9, such as paint_a",
        ),
        (("paint_*", "photo_*", "Sketch_*"), r"'Sketch_\*' of client 2 fits 0 classes; it must fit 3"),
        (("paint_*", "photo_*", "[ps]*o_*"), "class photo_a fits the patterns of two clients"),
    ):
        with pytest.raises(ValueError, match=message):
            make_split(train, test, replace(spec, private_names=patterns), 0, names)


def test_the_order_of_tasks_changes_neither_classes_nor_shares() -> None:
    own, common = (_shares(SplitSpec(**{**COMMON, "task_order": order})) for order in ("own", "common"))
    assert own == common


def test_a_place_with_some_clients_knows_the_classes_of_all() -> None:
    split = make_split(SMALL_TRAIN, SMALL_TEST, SMALL, 0)
    union = [{label for client in split.clients for label in client.tasks[n].classes} for n in range(2)]
    assert [set(classes) for classes in split.federation] == union
    share = Split.from_json(split.only([1]).to_json())
    assert share.federation == split.federation
    assert [len(client.tasks) for client in share.clients] == [0, 2]
    raw = json.loads(share.to_json())
    for damage, message in (
        (lambda: raw.pop("federation"), "number of tasks in federation: found 0"),
        (lambda: raw.update(federation=[[], []]), "client 1, task 0: classes not in federation"),
        (lambda: raw.update(federation=[["a"], []]), "whole numbers"),
    ):
        damage()
        with pytest.raises(ValueError, match=message):
            Split.from_json(json.dumps(raw))


def test_spare_classes_are_drawn_by_seed_and_class_ids_may_have_gaps() -> None:
    train, test = np.repeat(np.arange(40), 20) * 7, np.arange(40) * 7

    def chosen(seed: int) -> set[int]:
        clients = make_split(train, test, SMALL, seed).clients
        return {label for client in clients for label in client.private + client.public}

    assert len(chosen(0)) == 6
    assert chosen(0) != chosen(1)
    assert all(label % 7 == 0 for label in chosen(0))


def test_holdout_leaves_test_images_alone() -> None:
    spec = replace(SMALL, local_test="holdout30")
    with_test = make_split(SMALL_TRAIN, SMALL_TEST, spec, 0)
    without = make_split(SMALL_TRAIN, [0], spec, 0)
    assert with_test.sha256 == without.sha256
    full = make_split(SMALL_TRAIN, SMALL_TEST, SMALL, 0)
    for ours, theirs in zip(with_test.clients, full.clients, strict=True):
        for held, whole in zip(ours.tasks, theirs.tasks, strict=True):
            assert sorted([*held.train, *held.test]) == whole.train.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tasks": 4},
            r"40, but tasks \* classes_per_task = 4 \* 8 = 32.*=10, tasks=5, public_classes=17, priv.*=7",
        ),
        ({"private_classes": 50}, r"75, but .*: classes_per_task=15, private_classes=15$"),
        ({"clients": 0}, "split.clients is 0"),
        ({"tasks": 2.5}, "split.tasks is 2.5"),
        ({"classes_per_task": True}, "split.classes_per_task is True"),
        (
            {"classes_per_task": [8, 8]},
            r"split.classes_per_task is \[8, 8\]; it must have a number for each of 5 tasks",
        ),
        ({"classes_per_task": [8, 8, 8, 8, 0]}, "split.classes_per_task is .* whole numbers from 1 on"),
        (
            {"classes_per_task": (8, 8, 8, 8, 9)},
            r"40, but classes_per_task 8 \+ 8 \+ 8 \+ 8 \+ 9 = 41.*: classes_per_task=8,",
        ),
        ({"private_names": ["a*", "b*"]}, "split.private_names has 2 patterns; it must have one for each of 5 clients"),
        ({**COMMON, "classes_per_task": (4, 9, 9, 9, 9), "classes_per_client": 5}, "is 5; a task has 4 classes"),
        ({"private_classes": -1}, "split.private_classes is -1"),
        ({"min_public_images": None}, "split.min_public_images is None"),
        ({"train_per_class": 0}, "split.train_per_class is 0"),
        ({"test_per_class": -3}, "split.test_per_class is -3"),
        ({"dirichlet_alpha": 0}, "split.dirichlet_alpha is 0"),
        ({"dirichlet_alpha": float("nan")}, "split.dirichlet_alpha is nan"),
        ({"dirichlet_alpha": float("inf")}, "split.dirichlet_alpha is inf"),
        ({"local_test": "half"}, "split.local_test is 'half'"),
        ({"task_order": "mine"}, "split.task_order is 'mine'; it must be 'own' or 'common'"),
        ({"task_order": "common"}, "split.private_classes is 15; .* must be 0, and split.public_classes 40"),
        ({"classes_per_client": 2}, "split.classes_per_client is 2; it needs split.task_order common"),
        ({**COMMON, "classes_per_client": 0}, "split.classes_per_client is 0"),
        ({**COMMON, "classes_per_client": 9}, "split.classes_per_client is 9; a task has 8 classes"),
        ({**COMMON, "classes_per_client": 1}, r"clients \* classes_per_client = 5 \* 1 is less than the 8 classes"),
    ],
)
def test_a_spec_that_cannot_be_met_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SplitSpec(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "train", "test", "seed", "message"),
    [
        (SplitSpec(clients=6), PAPER_TRAIN, PAPER_TEST, 0, r"6 \* 15 \+ 25 = 115 classes, .* have 100"),
        (
            SplitSpec(),
            PAPER_TRAIN,
            PAPER_TEST[4:],
            0,
            r"classes \[0\] have training images but no test image",
        ),
        (
            SplitSpec(min_public_images=11),
            PAPER_TRAIN,
            PAPER_TEST,
            0,
            r"need 55 images .* has 50 .* most 10 fits",
        ),
        (SMALL, SMALL_TRAIN, SMALL_TEST, -1, "seed is -1"),
        (SMALL, SMALL_TRAIN, SMALL_TEST, 0.5, "seed is 0.5"),
        (SMALL, SMALL_TRAIN / 1.0, SMALL_TEST, 0, "train_labels has .* float64"),
        (SMALL, SMALL_TRAIN, SMALL_TEST[None], 0, r"test_labels has shape \(1, 30\)"),
        (SMALL, SMALL_TRAIN, [], 0, "test_labels has shape"),
        (SMALL, SMALL_TRAIN - 1, SMALL_TEST, 0, "train_labels .* from 0 on"),
    ],
)
def test_labels_that_do_not_allow_the_spec_are_refused(
    spec: SplitSpec, train: np.ndarray, test: np.ndarray, seed: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_split(train, test, spec, seed)


def test_a_task_with_too_few_images_names_the_place_and_the_remedy() -> None:
    skewed = SplitSpec(private_classes=0, public_classes=40, dirichlet_alpha=1e-3)
    with pytest.raises(
        ValueError, match=r"client \d, task \d: [01] training and 32 test images for the classes \["
    ) as e:
        make_split(PAPER_TRAIN, PAPER_TEST, skewed, 0)
    for remedy in ("split.min_public_images (0)", "split.dirichlet_alpha (0.001)", "another seed (0)"):
        assert remedy in str(e.value)
    make_split(PAPER_TRAIN, PAPER_TEST, replace(skewed, min_public_images=1), 0)
    with pytest.raises(ValueError, match=r"0 test images .* split\.train_per_class"):
        make_split(
            SMALL_TRAIN,
            SMALL_TEST,
            replace(
                SMALL,
                train_per_class=1,
                local_test="holdout30",
                public_classes=0,
                private_classes=4,
                clients=1,
            ),
            0,
        )


def _set_train(raw: dict[str, Any], client: int, task: int, value: object) -> None:
    raw["clients"][client]["tasks"][task]["train"] = value


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw.pop("seed"), "keys"),
        (lambda raw: raw.update(extra=1), "keys"),
        (lambda raw: raw["spec"].update(tusks=1), "tusks"),
        (lambda raw: raw["spec"].update(clients=3), "number of clients: found 2, expected 3"),
        (lambda raw: raw["clients"][0].update(private=raw["clients"][1]["private"]), "private|classes"),
        (lambda raw: raw["clients"][1].update(public=[0, 1]), "client 1: "),
        (lambda raw: raw["clients"][0]["tasks"].pop(), "client 0: number of tasks: found 1, expected 2"),
        (lambda raw: raw["clients"][0]["tasks"][1].update(classes=[0, 0]), "client 0: classes of all tasks"),
        (lambda raw: _set_train(raw, 0, 0, raw["clients"][1]["tasks"][0]["train"]), "more than once"),
        (lambda raw: raw["clients"][0]["tasks"][0]["train"].reverse(), "client 0, task 0: train .* sorted"),
        (lambda raw: _set_train(raw, 1, 1, [-1, 5]), "client 1, task 1: train"),
        (lambda raw: _set_train(raw, 1, 1, [1.5, 2.5]), "whole numbers"),
        (lambda raw: _set_train(raw, 1, 1, [0, 2**70]), "too large"),
        (lambda raw: _set_train(raw, 1, 1, [4]), "1 training and"),
    ],
)
def test_damaged_json_is_refused(damage: object, message: str) -> None:
    raw = json.loads(make_split(SMALL_TRAIN, SMALL_TEST, SMALL, 0).to_json())
    damage(raw)  # type: ignore[operator]
    with pytest.raises(ValueError, match=f"not a split.*({message})"):
        Split.from_json(json.dumps(raw))


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"spec": 1, "seed": 0, "clients": []}', "null"])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a split"):
        Split.from_json(text)


def test_json_is_plain_and_complete() -> None:
    raw = json.loads(make_split(SMALL_TRAIN, SMALL_TEST, SMALL, 0).to_json())
    # what a later version has added stays out where it is off, or recorded hashes would change
    assert raw["spec"] == {name: value for name, value in asdict(SMALL).items() if name not in ADDED}
    assert not {name for name, value in ADDED.items() if getattr(SMALL, name) != value}
    assert raw["seed"] == 0
    assert set(raw["clients"][0]) == {"private", "public", "tasks"}
