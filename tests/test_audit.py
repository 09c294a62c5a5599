"""The audit: exact leaks of a made-up upload, scores and rates against hand-computed values, and a tiny run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import SETTING

from fedlscl.analysis.audit_section import audit_section
from fedlscl.audit import attack as attacks
from fedlscl.audit import membership, reconstruction
from fedlscl.audit.contents import Contents, square
from fedlscl.audit.exact import exact_leaks, owners
from fedlscl.audit.membership import auc, leverage, measured, nearest, pull, tpr
from fedlscl.audit.reconstruction import correlation, found_again, small
from fedlscl.audit.run import AuditedRun
from fedlscl.cli import main
from fedlscl.methods.statistics.heads import ClassGaussians, Ridge, triangle
from fedlscl.methods.statistics.noisy import NoisyRidge

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).mul(4096).round().double() / 4096
LABELS = torch.tensor([0, 0, 0, 1, 2, 2])
"""Three images of class 0, one of 1, two of 2, none of 3."""


# ------------------------------------------------------------------------------------ exact leaks


def test_a_class_with_one_image_gives_its_feature_away() -> None:
    sums = Ridge(strength=1.0).sums(X, LABELS, torch.zeros(6, dtype=torch.int64), 4)
    contents = Contents.of(sums, 5)
    assert contents.counts is not None
    assert contents.counts.tolist() == [[3, 1, 2, 0]]
    assert contents.gram is not None
    assert torch.equal(contents.gram[:5, :5], X.T @ X)
    (claim,) = exact_leaks(contents)
    assert claim.label == 1
    assert torch.equal(claim.feature, X[3])
    assert owners([claim], X, LABELS) == [3]
    assert owners([claim], X, torch.zeros(6)) == owners([claim], X[:3], LABELS[:3]) == [None]


def test_parts_of_a_class_give_more_away() -> None:
    numbers = torch.tensor([0, 0, 4, 4, 0, 4])  # 4 is held out
    claims = exact_leaks(Contents.of(Ridge().sums(X, LABELS, numbers, 4), 5))
    assert sorted(place for place in owners(claims, X, LABELS) if place is not None) == [2, 3, 4, 5]
    assert len(claims) == 4


def test_second_moments_give_two_images_of_a_class_away() -> None:
    sums = ClassGaussians().sums(X, LABELS, torch.zeros(6, dtype=torch.int64), 4)
    claims = exact_leaks(Contents.of(sums, 5))
    assert sorted(place for place in owners(claims, X, LABELS) if place is not None) == [3, 4, 5]


def test_noise_leaves_nothing_exact() -> None:
    sums = ClassGaussians().sums(X, LABELS, torch.zeros(6, dtype=torch.int64), 4)
    noisy = {name: tensor + 1e-3 * torch.randn_like(tensor) for name, tensor in sums.items()}
    assert exact_leaks(Contents.of(noisy, 5)) == []


def test_every_row_is_of_an_image() -> None:
    contents = Contents.of({"features": X[[4, 1]].float(), "weight": torch.ones(3, 5)}, 5)
    assert owners(exact_leaks(contents), X, LABELS) == [4, 1]
    assert contents.sums is contents.gram is None
    assert Contents.of({"features": X}, 7).rows is None
    assert torch.equal(square(triangle(X.T @ X)), X.T @ X)


# ------------------------------------------------------------------------------------- membership


def test_rates_are_what_is_counted_by_hand() -> None:
    members, others = np.array([3.0, 2.0, 1.0]), np.array([2.0, 0.0])
    assert auc(members, others) == pytest.approx((2 + 1.5 + 1) / 6)
    hundred = np.arange(100.0)
    # one of a hundred may be above: 99 is, so that the threshold is 98
    assert tpr(np.array([98.0, 98.5, 99.5, 0.0]), hundred) == 0.5
    assert tpr(np.array([98.0, 98.5, 99.5, 0.0]), hundred[1:]) == 0.25
    assert auc(hundred, hundred) == 0.5


def test_intervals_hold_the_truth_and_shrink() -> None:
    rng = np.random.default_rng(0)
    few, many = (measured([(rng.normal(1, 1, n), rng.normal(0, 1, n))]) for n in (60, 600))
    truth = 0.7602  # Phi(1 / sqrt(2))
    for found in (few, many):
        assert found.auc.low < truth < found.auc.high
    assert few.auc.high - few.auc.low > 2 * (many.auc.high - many.auc.low)


def test_scores_know_what_is_in_a_sum() -> None:
    rng = torch.Generator().manual_seed(1)
    inside, outside = (torch.randn(8, 20, generator=rng, dtype=torch.float64) for _ in range(2))
    # the leverages of independent vectors in their own sum are 1 each, of others much more
    torch.testing.assert_close(leverage(inside.T @ inside, inside), -torch.ones(8, dtype=torch.float64))
    assert bool((leverage(inside.T @ inside, outside) < -1e3).all())
    with_one = torch.nn.functional.pad(inside, (0, 1), value=1.0)
    torch.testing.assert_close(leverage(with_one.T @ with_one, inside), -torch.ones(8, dtype=torch.float64))
    assert nearest(inside, inside).tolist() == [0.0] * 8
    assert float(nearest(inside[:1], outside[:1])) == pytest.approx(-float((inside[0] - outside[0]).norm()))
    labels, public = torch.zeros(8, dtype=torch.int64), torch.randn(400, 20, generator=rng, dtype=torch.float64)
    contents = Contents(sums=inside.sum(dim=0)[None, None], counts=torch.tensor([[8.0]]))
    of_public = torch.zeros(400, dtype=torch.int64)
    scores = [pull(contents, x, labels, public, of_public) for x in (inside, outside)]
    assert float(scores[0].mean()) > float(scores[1].mean()) + 1


def test_sums_with_noise_are_attacked_as_such() -> None:
    """They have no counts, a triangle for G, and say how much noise there is."""
    rng = torch.Generator().manual_seed(3)
    x = torch.nn.functional.normalize(torch.randn(300, 12, generator=rng, dtype=torch.float64) + 2, dim=1)
    inside, public, labels = x[:20], x[40:], torch.zeros(20, dtype=torch.int64)
    head, tensors = NoisyRidge(Ridge()), dict[str, torch.Tensor]()
    for name, tensor in head.sums(inside, labels, labels, 2).items():
        deviation = 0.2 * head.scales(12, 2).get(name, torch.zeros(()))
        tensors[name] = tensor + deviation * torch.randn(tensor.shape, generator=rng, dtype=torch.float64)
    tensors["noise"] = torch.tensor(0.04)
    contents = Contents.of(tensors, 12)
    assert contents.counts is None
    assert contents.noise == pytest.approx(0.2)
    assert contents.gram is not None
    assert float((contents.gram - inside.T @ inside).abs().max()) < 5
    assert exact_leaks(contents) == []
    scores = [pull(contents, part, labels, public, torch.zeros(260)) for part in (inside, x[20:40])]
    assert auc(*(one.numpy() for one in scores)) > 0.6
    # below the noise nothing counts: the score is that of the identity, whatever is in the sum
    flat = leverage(contents.gram, inside, noise=1e9)
    assert float(flat.max() / flat.min()) == pytest.approx(1, abs=1e-6)


# --------------------------------------------------------------------------------- reconstruction


def test_a_decoder_learns_a_linear_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "STEPS", 150)
    rng = torch.Generator().manual_seed(2)
    images, project = torch.rand(64, 3, 2, 2, generator=rng), torch.randn(12, 24, generator=rng)
    features = images.flatten(1) @ project
    decoder = reconstruction.Decoder(features[:56], images[:56], seed=0)
    assert torch.equal(decoder(features), reconstruction.Decoder(features[:56], images[:56], seed=0)(features))
    made, mean = decoder(features[56:]), images[:56].mean(dim=0).expand(8, 3, 2, 2)
    assert float(correlation(made, images[56:]).mean()) > float(correlation(mean, images[56:]).mean()) + 0.4
    assert found_again(images[:4], torch.arange(4), images[:4], torch.zeros(4), torch.zeros(4)) == (1.0, 0.25)
    assert correlation(images, 2 * images + 1).tolist() == pytest.approx([1.0] * 64)
    assert small(torch.full((1, 3, 8, 8), 255, dtype=torch.uint8), 4).shape == (1, 3, 4, 4)


# ---------------------------------------------------------------------------------------- the report


def test_a_folder_that_is_no_audit_is_refused_and_texts_are_escaped(tmp_path: Path) -> None:
    assert audit_section([]) == ""
    with pytest.raises(ValueError, match=r"lacks audit\.json, must be a folder that `fedlscl audit --out` wrote"):
        audit_section([tmp_path])
    table = {"title": "<a>", "runs": "", "note": "", "header": ["x", "y"], "rows": [["<b>", "1 & 2"]]}
    content: dict[str, Any] = {"tables": [table], "pictures": []}
    (tmp_path / "audit.json").write_text(json.dumps(content))
    page = audit_section([tmp_path])
    assert '<tr><th scope="row">&lt;b&gt;</th><td>1 &amp; 2</td></tr>' in page
    assert "<a>" not in page
    (tmp_path / "picture.png").write_bytes(b"<svg>")
    content["pictures"] = [{"file": "../picture.png", "title": ""}]
    (tmp_path / "audit.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is damaged, or of another version"):
        audit_section([tmp_path])


# ---------------------------------------------------------------------------------------- a run


def configured(folder: Path, cache: Path, method: dict[str, Any]) -> str:
    content = {**SETTING, **method, "data": {**SETTING["data"], "cache_dir": str(cache)}, "federation": {"rounds": 1}}
    content["data"]["source"] = {"class_path": "helpers.Patterns", "init_args": {"classes": 11, "train": 24}}
    content["data"]["split"] = {**SETTING["data"]["split"], "train_per_class": 12}
    (folder / "setting.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "setting.yaml")


STATISTICS: dict[str, Any] = {
    "method": "ridge",
    "model": {
        "class_path": "StatisticsClient",
        "init_args": {"head": {"class_path": "Ridge", "init_args": {"strength": 1.0}}},
    },
    "server": {"class_path": "StatisticsServer"},
}
SETS: dict[str, Any] = {
    "method": "sets",
    "model": {
        "class_path": "FedLSCL",
        "init_args": {"epochs": 1, "block": 2, "rank": 2, "buffer_size": 3, "continual": {"class_path": "NoReplay"}},
    },
    "server": {"class_path": "ExactO2D"},
}
BOTH: dict[str, Any] = {
    "method": "both",
    "model": {"class_path": "BothDiscriminantsClient", "init_args": {"epochs": 1}},
    "server": {"class_path": "BothDiscriminantsServer"},
}


@pytest.mark.usefixtures("command_line")
def test_a_server_answers_in_the_round_in_which_it_was_sent_something(tmp_path: Path, cache: Path) -> None:
    words, run_dir = ["--config", configured(tmp_path, cache, BOTH)], tmp_path / "run"
    main(["fit", *words, "--tracking.received", "true", "--federation.rounds", "2", "--run_dir", str(run_dir)])
    run = AuditedRun(run_dir)
    rounds = {sight.round: run.context(sight).round for sight in run.sights}
    expected = {round.number: round for round in run.schedule.after(0, run.data.split.spec.tasks, run.seed)}
    assert rounds == {number: expected[number] for number in rounds}
    assert [round.ends_task for round in rounds.values()][:2] == [False, True]
    assert attacks.SUM in attacks.attack(run, reconstruct=0).exact


@pytest.mark.usefixtures("command_line")
def test_sums_of_a_run_are_attacked(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconstruction, "STEPS", 3)
    monkeypatch.setattr(membership, "DRAWS", 20)
    words, run_dir = ["--config", configured(tmp_path, cache, STATISTICS)], tmp_path / "run"
    main(["fit", *words, "--tracking.received", "true", "--run_dir", str(run_dir)])
    main(["audit", str(run_dir), "--out", str(tmp_path / "out"), "--reconstruct", "1"])
    text = capsys.readouterr().out
    assert "Exact leaks" in text
    assert "leverage under G" in text
    assert (tmp_path / "out" / "membership.csv").is_file()
    assert list((tmp_path / "out").glob("ridge-*.png"))
    main(["report", str(run_dir), "--out", str(tmp_path / "page.html"), "--audit", str(tmp_path / "out")])
    page = (tmp_path / "page.html").read_text()
    assert page.count('<img src="data:image/png;base64,') == len(list((tmp_path / "out").glob("*.png")))
    assert "<td>leverage under G</td>" in page
    assert page.index('href="#audit"') < page.index('<h2 id="audit">') < page.index('<h2 id="reading">')

    run = AuditedRun(run_dir)
    assert not run.halved
    found = attacks.attack(run, reconstruct=0)
    held = [task.train for client in run.data.split.clients for task in client.tasks]
    assert not set(run.public.indices.tolist()) & {int(place) for part in held for place in part}
    exact = found.exact[attacks.UPLOAD]
    assert exact.images == sum(map(len, held))
    assert (exact.counts, exact.classes, exact.asked) == (6, 6, 6)
    # of each client and task there are fewer images than features, so that the sum tells members for certain
    key = (attacks.UPLOAD, "training images of the task", "leverage under G", attacks.PUBLIC)
    assert all(auc(*pair) > 0.99 for pair in found.members[key])
    # the model that follows from one upload alone is told from it
    assert len(found.members[attacks.SUM, key[1], "loss of the model", attacks.PUBLIC]) == 6

    # secure sums are what the audit of a run without them says that they would be
    main(["fit", *words, "--tracking.received", "true", "--federation.secure", "true", "--run_dir", f"{run_dir}-sums"])
    secure = attacks.attack(AuditedRun(tmp_path / "run-sums"), reconstruct=0)
    assert [*secure.exact] == [attacks.SUM]
    assert secure.exact[attacks.SUM] == found.exact[attacks.SUM]
    for what, groups in secure.members.items():
        for ours, theirs in zip(groups, found.members[what], strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.usefixtures("command_line")
def test_sets_of_features_of_a_run_are_attacked(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "STEPS", 3)
    words, run_dir = ["--config", configured(tmp_path, cache, SETS)], tmp_path / "run"
    main(["fit", *words, "--run_dir", str(run_dir)])
    with pytest.raises(SystemExit):
        main(["audit", str(run_dir)])
    with pytest.raises(FileNotFoundError, match=r"--tracking\.received true"):
        AuditedRun(run_dir)
    main(["fit", *words, "--tracking.received", "true", "--run_dir", str(tmp_path / "again")])
    found = attacks.attack(AuditedRun(tmp_path / "again"), reconstruct=1)
    exact = found.exact[attacks.UPLOAD]
    assert exact.claimed == exact.right == exact.images == 3 * 12
    for attacker, sure in zip(attacks.ATTACKERS.values(), (False, False, True), strict=True):
        key = (attacks.UPLOAD, "images in the buffer", "distance to the nearest row", attacker)
        assert all(auc(*pair) == 1.0 for pair in found.members[key]) is sure
        assert len(found.members[key]) == (1 if attacker.startswith("that") else 3)
        assert len(found.made[attacks.UPLOAD, "features of single images", attacker].similarity) == 12
    assert attacks.SUM not in found.exact  # its server needs more than sums
