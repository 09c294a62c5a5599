"""All attacks on one run, and what came of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedlscl.audit import membership
from fedlscl.audit.contents import Contents
from fedlscl.audit.exact import Claim, changed_rows, exact_leaks, owners
from fedlscl.audit.membership import Scores
from fedlscl.audit.reconstruction import Decoder, correlation, found_again, small
from fedlscl.audit.run import AuditedRun, Pool, State
from fedlscl.run.received import Sight
from fedlscl.run.summary import Promise

UPLOAD, SUM = "one client's upload", "sum over the clients"
PUBLIC = "public model"
ATTACKERS: Mapping[State, str] = {
    "start": "CNN from the run's seed",
    "imitated": "that, trained on public images",
    "end": "the client's own CNN",
}
"""What is known of the model whose features travel, where it is not public and does not travel."""

SIDE = 32
"""Pixels of the largest images that a decoder makes."""
SHOWN = 12


@dataclass
class Exact:
    """What follows from the messages by arithmetic, over all that were attacked.

    `right` of the `claimed` features are those of an image of the client, `images` such images there are; of `asked`
    messages `classes` give the list of the client's classes and `counts` the number of images of each.
    """

    claimed: int = 0
    right: int = 0
    images: int = 0
    asked: int = 0
    classes: int = 0
    counts: int = 0


@dataclass
class Made:
    """Images that were made of what was received, beside the true ones, and what is known without it."""

    similarity: list[float] = field(default_factory=list)  # correlation of pixels with the true image
    baseline: list[float] = field(default_factory=list)  # of the mean of public images of its class
    found: list[float] = field(default_factory=list)  # in how many cases it is found among its class
    chance: list[float] = field(default_factory=list)
    pictures: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # true, made, class mean


@dataclass
class Found:
    """All of a run, by view and what else tells rows of a table apart."""

    exact: dict[str, Exact] = field(default_factory=lambda: defaultdict(Exact))
    members: dict[tuple[str, str, str, str], list[tuple[Scores, Scores]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    made: dict[tuple[str, str, str], Made] = field(default_factory=lambda: defaultdict(Made))
    privacy: Promise | None = None


def attack(run: AuditedRun, seed: int = 0, reconstruct: int = 2) -> Found:
    """Attack all that a run's server received, and the sums that secure aggregation would have left of it.

    Args:
        run: the run.
        seed: of what the attacks draw.
        reconstruct: of how many clients images are made.
    """
    found, decoders = Found(privacy=run.summary.privacy), dict[object, Decoder]()
    for view, sights in ((UPLOAD, run.uploads()), (SUM, run.totals())):
        for sight in sights:
            for client in sight.clients:
                _Client(run, sight, client, view, seed, decoders, client < reconstruct).attack(found)
    _heads(run, found)
    for client in range(min(reconstruct, run.template.clients)):
        for sight in run.richer(client):
            if (made := run.made_images(sight)) is not None:
                _server_made(run, sight, found, *made)
    return found


class _Client:
    """One client, behind one message or sum."""

    def __init__(
        self,
        run: AuditedRun,
        sight: Sight,
        client: int,
        view: str,
        seed: int,
        decoders: dict[object, Decoder],
        thorough: bool,
    ) -> None:
        self.run, self.sight, self.client, self.view = run, sight, client, view
        self.seed, self.decoders, self.thorough = seed, decoders, thorough
        self.pools = run.members(client, sight)
        self.images = next(iter(self.pools.values()))
        end = run.features(client, "end", self.images)
        self.own = end
        self.contents = Contents() if end is None else Contents.of(sight.tensors, end.shape[1])
        self.attackers: dict[str, State] = {}
        if end is not None:
            known = {name: state for state, name in ATTACKERS.items() if state != "imitated" or self._imitable()}
            self.attackers = {PUBLIC: "end"} if run.common else known

    def _imitable(self) -> bool:
        """Training takes time, and public images among the training images."""
        return self.thorough and not self.run.halved

    def attack(self, found: Found) -> None:
        """Everything."""
        self._membership(found)
        claims = exact_leaks(self.contents)
        self._exact(found.exact[self.view], claims)
        if self.thorough and self.own is not None:
            self._reconstruct(found, claims)

    # ---- exact leaks

    def _exact(self, exact: Exact, claims: list[Claim]) -> None:
        if self.own is None:
            return
        whose = owners(claims, self.own, self.images.labels)
        first = self.client == self.sight.clients[0]  # claims on a sum are of some client
        exact.claimed += len(claims) if first else 0
        exact.right += len({place for place in whose if place is not None})
        exact.images += len(self.images.labels)
        if self.contents.counts is not None:
            said = self.contents.counts.sum(dim=0)
            true = torch.bincount(self.images.labels, minlength=len(said))
            exact.asked += 1
            exact.classes += bool(torch.equal(said > 0.5, true > 0))
            exact.counts += bool(torch.equal(said, true.double()))

    # ---- membership

    def _membership(self, found: Found) -> None:
        answer = self.run.answer(self.sight)
        for name, pool in self.pools.items():
            two = self.run.others(self.client, pool, self.seed)

            def note(attack: str, attacker: str, scores: list[Tensor], name: str = name) -> None:
                members, others = (one.double().numpy() for one in scores)
                found.members[self.view, name, attack, attacker].append((members, others))

            if answer is not None:
                losses = self.run.losses(answer, self.client, self.sight.task, two)
                if losses is not None:
                    note("loss of the model", PUBLIC, [-loss for loss in losses])
            for attacker, state in self.attackers.items():
                features = [self._of(state, pool) for pool in two]
                if self.contents.rows is not None:
                    rows = self.contents.rows
                    note("distance to the nearest row", attacker, [membership.nearest(rows, x) for x in features])
                if self.contents.gram is not None:
                    gram, noise = self.contents.gram, self.contents.noise
                    note("leverage under G", attacker, [membership.leverage(gram, x, noise) for x in features])
                if self.contents.sums is not None:
                    known, labels = self._of(state, self.run.public), self.run.public.labels
                    pairs = zip(features, two, strict=True)
                    scores = [membership.pull(self.contents, x, y.labels, known, labels) for x, y in pairs]
                    note("mean of the class", attacker, scores)

    def _of(self, state: State, pool: Pool) -> Tensor:
        features = self.run.features(self.client, state, pool)
        assert features is not None  # or there would be no attacker
        return features

    # ---- images

    def _reconstruct(self, found: Found, claims: list[Claim]) -> None:
        assert self.own is not None
        run, labels = self.run, self.images.labels
        pixels, public = (small(run.pixels(pool), SIDE) for pool in (self.images, run.public))
        whose = owners(claims, self.own, labels)
        rows = [(claim.feature, place) for claim, place in zip(claims, whose, strict=True) if place is not None]
        means = self._class_means() if self.view == UPLOAD else []
        if not rows and not means:
            return
        for attacker, state in self.attackers.items():
            key = None if run.common else (self.client, state)
            if key not in self.decoders:
                self.decoders[key] = Decoder(self._of(state, run.public), public, self.seed)
            decoder = self.decoders[key]
            if rows:
                true = torch.tensor([place for _, place in rows])
                made = decoder(torch.stack([feature for feature, _ in rows]))
                usual = torch.stack([self._usual(public, int(label)) for label in labels[true]])
                result = found.made[self.view, "features of single images", attacker]
                _note(result, pixels[true], made, usual)
                hits, chance = found_again(made, true, pixels, labels[true], labels)
                result.found += [hits] * len(true)
                result.chance += [chance] * len(true)
            if means:
                made = decoder(torch.stack([feature for feature, _ in means]))
                true_means = torch.stack([pixels[labels == label].mean(dim=0) for _, label in means])
                usual = torch.stack([self._usual(public, label) for _, label in means])
                _note(found.made[self.view, "means of classes", attacker], true_means, made, usual)

    def _class_means(self) -> list[tuple[Tensor, int]]:
        """What was sent of the classes that the client has, as features of their means."""
        if self.contents.sums is None or self.contents.counts is None:
            return []
        sums, counts = self.contents.sums.sum(dim=0), self.contents.counts.sum(dim=0)
        return [(sums[label] / counts[label], label) for label in torch.unique(self.images.labels).tolist()]

    def _usual(self, public: Tensor, label: int) -> Tensor:
        return _usual(self.run, public, label)


def _usual(run: AuditedRun, public: Tensor, label: int) -> Tensor:
    """The mean of public images (3, S, S) of a class, or of all where there is none of it."""
    of_class = run.public.labels == label
    return public[of_class if bool(of_class.any()) else slice(None)].mean(dim=0)


def _server_made(run: AuditedRun, sight: Sight, found: Found, images: Tensor, labels: Tensor) -> None:
    """The client's image that each one resembles most stands for the true one, as it does for the class mean."""
    result = found.made[UPLOAD, "images that the server makes", PUBLIC]
    own = next(iter(run.members(sight.clients[0], sight).values()))
    pixels, public = (small(run.pixels(pool), SIDE) for pool in (own, run.public))
    made = F.interpolate(images.float(), size=pixels.shape[-1], mode="area")
    for image, label in zip(made, labels.tolist(), strict=True):
        of_class = pixels[own.labels == label]
        if not len(of_class):
            continue
        usual = _usual(run, public, label)
        best = of_class[correlation(image.expand_as(of_class), of_class).argmax()]
        _note(result, best[None], image[None], usual[None])
        result.baseline[-1] = float(correlation(usual.expand_as(of_class), of_class).max())


def _note(result: Made, true: Tensor, made: Tensor, usual: Tensor) -> None:
    result.similarity += correlation(made, true).tolist()
    result.baseline += correlation(usual, true).tolist()
    places = np.linspace(0, len(true) - 1, min(SHOWN, len(true))).astype(int)
    result.pictures += [(true[k], made[k], usual[k]) for k in places.tolist()]


def _heads(run: AuditedRun, found: Found) -> None:
    """The classes of a client show in which rows of a head its first round has moved, where a head travels."""
    start = run.template.common_start
    heads = [name for name, t in start.items() if t.ndim == 2 and len(t) == run.data.num_classes]
    first = [sight for sight in run.sights if sight.round == 1 and not sight.summed]
    for sight in first if heads else []:
        moved = changed_rows(start[heads[-1]], sight.tensors[heads[-1]])
        true = sorted(run.data.split.clients[sight.clients[0]].tasks[0].classes)
        exact = found.exact[UPLOAD]
        exact.asked += 1
        exact.classes += moved.nonzero().flatten().tolist() == true
