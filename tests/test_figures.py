"""The figures over many runs: what is drawn is what the summaries say, readable, and written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from made_runs import make_run, traffic
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from fedlscl.analysis.captions import Picture
from fedlscl.analysis.comparison import Comparison, compare
from fedlscl.analysis.drawing import COLUMN, MARKERS
from fedlscl.analysis.figures import pictures, save
from fedlscl.analysis.results import Run
from fedlscl.analysis.schemes import INK, ON_COLOUR, PAGE
from fedlscl.evaluation import MASKS
from fedlscl.run.summary import Accuracy, Promise

MIB = 2**20
Matrix = Sequence[Sequence[Sequence[float | None]]]


def run(
    method: str,
    seed: int,
    matrix: Matrix,
    *,
    mib: float = 1.0,
    block: int = 3,
    buffer_size: int = 20,
    cnn: str | list[str] = "resnet18",
    **changes: Any,
) -> Run:
    """A finished run with `matrix` under "seen", 7 % everywhere under the other masks, a third of `mib` sent up."""
    other = [[[None if a is None else 7.0 for a in row] for row in rows] for rows in matrix]
    sent = {"bytes_up": traffic(mib * MIB / 3), "bytes_down": traffic(mib * MIB * 2 / 3)}
    return make_run(
        method,
        seed,
        acc={"task": other, "seen": matrix, "federation": other, "none": other},
        config={"model.block": block, "model.buffer_size": buffer_size, "cnn.name": cnn},
        setting="made",
        backbone="vit",
        **sent,
        **changes,
    )


def level(first: float, second: float, then: float) -> Matrix:
    """One client, two tasks: `first` after task 1, then `then` on task 1 and `second` on task 2."""
    return [[[first, None], [then, second]]]


def one(runs: Sequence[Run]) -> Comparison:
    (comparison,) = compare(runs)
    return comparison


def drawn(runs: Sequence[Run], mask: str = "seen") -> dict[str, Picture]:
    return {picture.name: picture for picture in pictures(one(runs), mask)}


def lines(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """x and y of every line that has a name."""
    return {
        str(line.get_label()): (np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist())
        for line in axes.lines
        if not str(line.get_label()).startswith("_")
    }


def band(axes: Axes, index: int) -> dict[float, tuple[float, float]]:
    """Lower and upper limit of a band by x."""
    bands = [c for c in axes.collections if isinstance(c, PolyCollection) and not isinstance(c, LineCollection)]
    vertices = bands[index].get_paths()[0].vertices
    return {
        float(x): (float(vertices[vertices[:, 0] == x, 1].min()), float(vertices[vertices[:, 0] == x, 1].max()))
        for x in np.unique(vertices[:, 0])
    }


def bars(axes: Axes) -> list[list[float]]:
    """x, lower and upper end of every error bar."""
    collections = [c for c in axes.collections if isinstance(c, LineCollection)]
    return [[float(s[0, 0]), float(s[0, 1]), float(s[1, 1])] for c in collections for s in c.get_segments()]


# Two seeds of the usual block 3, and one seed of block 11; both clients count alike, whatever they have.
BLOCKS = [
    run("fed_lscl", 1, [[[90.0, None], [80.0, 100.0]], [[70.0, None], [60.0, None]]]),  # 80, then (90 + 60) / 2 = 75
    run("fed_lscl", 2, [[[84.0, None], [80.0, 82.0]], [[84.0, None], [80.0, 82.0]]]),  # 84, then 81
    run("fed_lscl", 1, [[[50.0, None], [40.0, 60.0]], [[50.0, None], [40.0, 60.0]]], block=11),
]
ROOT_2 = float(np.sqrt(2))


def test_a_field_has_a_line_for_each_value_in_rising_order_and_its_end_by_the_value() -> None:
    picture = drawn(BLOCKS[::-1])["accuracy_by_block"]
    above, below = picture.figure.axes
    assert list(lines(above)) == ["3", "11"]
    assert lines(above) == {"3": ([1, 2], [82, 78]), "11": ([1, 2], [50, 50])}
    ends = [(line.get_xdata()[0], line.get_ydata()[0]) for line in below.lines if line.get_marker() in MARKERS]
    assert ends == [(3, 78), (11, 50)]
    assert [tick.get_text() for tick in below.get_xticklabels()] == ["3", "11"]


def test_bands_and_bars_are_the_sample_deviation_and_a_single_seed_has_none() -> None:
    above, below = drawn(BLOCKS)["accuracy_by_block"].figure.axes
    limits = band(above, 0)
    assert limits[1] == pytest.approx((82 - 2 * ROOT_2, 82 + 2 * ROOT_2))  # deviation of 80 and 84
    assert limits[2] == pytest.approx((78 - 3 * ROOT_2, 78 + 3 * ROOT_2))  # of 75 and 81
    assert len([c for c in above.collections if isinstance(c, PolyCollection)]) == 1
    (bar,) = bars(below)
    assert bar == pytest.approx([3, 78 - 3 * ROOT_2, 78 + 3 * ROOT_2])


def test_the_buffer_has_its_picture_where_zero_images_and_a_hundred_have_a_place() -> None:
    runs = [run("fed_lscl", 1, level(50, 60, 40), buffer_size=size) for size in (100, 0, 20)]
    above, below = drawn(runs)["accuracy_by_buffer"].figure.axes
    assert list(lines(above)) == ["0", "20", "100"]
    places = below.transData.transform([(size, 50) for size in (0, 20, 100)])[:, 0]
    assert np.isfinite(places).all()
    assert (np.diff(places) > 20).all()


def test_the_mask_chooses_the_numbers_and_is_named() -> None:
    picture = drawn(BLOCKS, "task")["accuracy_by_block"]
    assert lines(picture.figure.axes[0])["11"][1] == [7, 7]
    assert 'mask "task"' in picture.caption
    with pytest.raises(ValueError, match="mask must be one of task, seen, federation, none, got 'all'"):
        pictures(one(BLOCKS), "all")


def test_what_has_no_runs_is_left_out() -> None:
    assert not pictures(Comparison("made", "vit", "test images"))
    assert set(drawn([run("lwf", 1, level(50, 60, 40))])) == {"forgetting", "accuracy_by_bytes"}
    assert set(drawn([run("lwf", 1, [[[50.0]]])])) == {"accuracy_by_bytes"}  # one task: nothing to forget
    usual = drawn([run("fed_lscl", 1, level(50, 60, 40))])
    assert set(usual) == {"clients_by_task", "forgetting", "accuracy_by_bytes"}
    # No block is the usual one here, so no heat map is the method's.
    blocks = drawn([run("fed_lscl", 1, level(50, 60, 40), block=block) for block in (0, 1)])
    assert set(blocks) == {"accuracy_by_method", "accuracy_by_block", "forgetting", "accuracy_by_bytes"}


def test_methods_stand_by_their_final_average_with_what_sees_all_images_below() -> None:
    unmeasured = Accuracy((), np.nan, np.nan, None, None, (((None, None), (None, None)),))
    runs = [
        run("joint", 1, level(1, 99, 99)),
        run("lorm", 1, level(1, 40, 30)),
        *BLOCKS[:2],  # 75 and 81
        make_run("nothing", accuracy=dict.fromkeys(MASKS, unmeasured), setting="made", backbone="vit"),
    ]
    picture = drawn(runs)["accuracy_by_method"]
    (axes,) = picture.figure.axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["fed_lscl", "lorm", "joint"]
    assert [patch.get_width() for patch in axes.patches if isinstance(patch, Rectangle)] == [78, 35, 99]
    assert [text.get_text() for text in axes.texts] == ["78.0 ± 4.2", "35.0", "99.0"]
    assert len({patch.get_facecolor() for patch in axes.patches[:2]}) == 1
    assert axes.patches[2].get_facecolor() != axes.patches[0].get_facecolor()
    low, high = axes.get_ylim()
    assert low > high  # the best is above
    assert picture.caption.endswith("Grey: sees the images of all clients and tasks at once.")


def test_the_heat_maps_are_means_over_seeds_of_the_final_model_with_each_clients_cnn() -> None:
    nan = np.nan
    own = ["resnet18", "vgg16"]
    runs = [
        *BLOCKS[:2],
        run("fed_lscl", 1, [[[1.0, None], [30.0, 40.0]], [[2.0, None], [50.0, 70.0]]], cnn=own),
        *(run("fed_lscl", 1, BLOCKS[2].summary.accuracy["seen"].matrix, block=block) for block in (5, 6)),
    ]
    figure = drawn(runs)["clients_by_task"].figure
    same, different = figure.axes[:2]
    # Only one seed has images of task 2 on client 1.
    np.testing.assert_array_equal(np.ma.filled(same.images[0].get_array(), nan), [[80, 91], [70, 82]])
    np.testing.assert_array_equal(np.ma.filled(different.images[0].get_array(), nan), [[30, 40], [50, 70]])
    assert [label.get_text() for label in same.get_yticklabels()] == ["0", "1"]
    assert [label.get_text() for label in different.get_yticklabels()] == ["0 resnet18", "1 vgg16"]
    alone = drawn(runs[2:3])["clients_by_task"].figure
    assert [label.get_text() for label in alone.axes[0].get_yticklabels()] == ["0 resnet18", "1 vgg16"]
    assert len(alone.axes) == 2  # the map and its colours


METHODS = [
    run("worse", 1, level(50, 40, 20)),  # 30 in the end
    run("better", 1, [[[90.0, None], [80.0, 100.0]], [[70.0, None], [40.0, None]]], task_aware=("seen",)),  # 65
    run("better", 2, [[[80.0, None], [64.0, 90.0]], [[80.0, None], [60.0, None]]], task_aware=("seen",)),  # 68.5
]


def test_forgetting_follows_each_task_in_a_panel_for_each_method_the_best_first() -> None:
    picture = drawn(METHODS)["forgetting"]
    better, worse = picture.figure.axes
    assert [axes.get_title() for axes in (better, worse)] == ["better*  66.8", "worse  30.0"]
    assert lines(better) == {"1": ([1, 2], [80, 61]), "2": ([2], [95])}
    assert lines(worse) == {"1": ([1, 2], [50, 20]), "2": ([2], [40])}
    limits = band(better, 0)
    assert limits[1] == pytest.approx((80, 80))
    assert limits[2] == pytest.approx((61 - ROOT_2, 61 + ROOT_2))  # deviation of 60 and 62
    assert bars(better) == [pytest.approx([2, 95 - 5 * ROOT_2, 95 + 5 * ROOT_2])]
    assert not worse.collections
    assert better.get_ylim() == worse.get_ylim()


def test_a_narrow_page_gets_forgetting_in_pieces_of_a_column_with_the_same_lines() -> None:
    picture = next(
        found for found in pictures(one([*METHODS, run("third", 1, level(60, 50, 40))]), narrow=True) if found.pieces
    )
    assert picture.name == "forgetting"
    assert {piece.get_figwidth() for piece in picture.pieces} == {COLUMN}
    panels = [axes for piece in picture.pieces[:-1] for axes in piece.axes]
    assert [axes.get_title() for axes in panels] == [axes.get_title() for axes in picture.figure.axes]
    assert [lines(axes) for axes in panels] == [lines(axes) for axes in picture.figure.axes]
    assert len({axes.get_ylim() for axes in panels}) == 1
    (key,) = picture.pieces[-1].legends
    assert [text.get_text() for text in key.get_texts()] == ["1", "2"]
    assert not any(found.pieces for found in pictures(one(METHODS)))


def test_a_method_that_is_told_the_task_bears_a_star_that_the_caption_explains() -> None:
    told = drawn(METHODS)
    for name in ("forgetting", "accuracy_by_bytes"):
        assert "* is told the task" in told[name].caption
        assert "*" not in drawn(METHODS, "none")[name].caption
    assert [text.get_text() for text in told["accuracy_by_bytes"].figure.legends[0].texts] == ["1  better*", "2  worse"]
    apart = next(found for found in pictures(one(METHODS), narrow=True) if found.name == "accuracy_by_bytes")
    assert apart.names == ("better*", "worse")
    assert not apart.figure.legends
    assert apart.figure.get_figwidth() == COLUMN
    ours = [run("fed_lscl", 1, level(9, 9, 9), block=block, task_aware=("seen",)) for block in (0, 1)]
    picture = drawn(ours)["accuracy_by_block"]
    legend = picture.figure.axes[0].get_legend()
    assert legend is not None
    assert legend.get_title().get_text() == "fed_lscl*: block of the ViT"
    assert "* is told the task" in picture.caption


def test_captions_count_the_seeds_and_say_what_the_bands_are() -> None:
    assert "One seed, hence no bands." in drawn(METHODS[:1])["forgetting"].caption
    assert "Mean over 2 seeds; bands and bars are ± one sample standard" in drawn(METHODS[1:])["forgetting"].caption
    assert "Mean over 1 to 2 seeds" in drawn(METHODS)["forgetting"].caption
    assert "Mean over 2 seeds." in drawn(BLOCKS[:2])["clients_by_task"].caption


def test_accuracy_stands_over_both_directions_in_mib_and_who_sends_nothing_stands_apart() -> None:
    runs = [
        *(run("big", seed, level(1, value, value), mib=mib) for seed, value, mib in ((1, 60.0, 7.0), (2, 64.0, 9.0))),
        run("small", 1, level(1, 70, 70), mib=0.25),
        run("silent", 1, level(1, 90, 90), mib=0),
    ]
    picture = drawn(runs)["accuracy_by_bytes"]
    silent, sending = picture.figure.axes
    assert lines(silent) == {"1  silent": ([0], [90])}
    assert lines(sending) == {
        "2  small": ([pytest.approx(0.25)], [70]),
        "3  big": ([pytest.approx(8)], [62]),
    }
    assert bars(sending) == [pytest.approx([8, 62 - 2 * ROOT_2, 62 + 2 * ROOT_2])]
    assert sending.get_xscale() == "log"
    assert "MiB" in sending.get_xlabel()
    assert silent.get_xlabel() == "nothing\nsent"
    assert silent.get_position().x1 < sending.get_position().x0
    assert "send nothing" in picture.caption
    assert [len(drawn(chosen)["accuracy_by_bytes"].figure.axes) for chosen in (runs[:3], runs[3:])] == [1, 1]


def test_a_study_of_unusual_runs_says_what_they_share() -> None:
    others = [run(method, 1, level(50, 60, 40), cnn="resnet18") for method in ("lorm", "glfc", "fedavg")]
    blocks = [run("fed_lscl", 1, level(50, 60, 40), block=block, cnn="vgg16") for block in (0, 3)]
    assert "All with cnn.name vgg16." in drawn([*others, *blocks])["accuracy_by_block"].caption
    assert "All with" not in drawn(blocks)["accuracy_by_block"].caption


def test_where_all_images_lie_in_one_place_no_bytes_stand_for_what_was_sent() -> None:
    runs = [run("joint", 1, level(1, 99, 99), mib=0), run("fedavg", 1, level(1, 60, 60))]
    found = drawn(runs)
    (axes,) = found["accuracy_by_bytes"].figure.axes
    assert list(lines(axes)) == ["1  fedavg"]
    assert len(found["forgetting"].figure.axes) == 2
    assert "accuracy_by_bytes" not in drawn(runs[:1])


def test_bands_of_many_lines_would_hide_each_other_and_bars_do_not() -> None:
    def blocks(count: int) -> Picture:
        chosen = [(block, seed) for block in range(count) for seed in (1, 2)]
        runs = [run("fed_lscl", seed, level(50, 60 + seed, 40), block=block) for block, seed in chosen]
        return drawn(runs)["accuracy_by_block"]

    few, many_more = blocks(6), blocks(7)
    for picture, count in ((few, 6), (many_more, 7)):
        above, below = picture.figure.axes
        bands = [c for c in above.collections if isinstance(c, PolyCollection) and not isinstance(c, LineCollection)]
        assert len(bands) == (count if picture is few else 0)
        assert len(bars(below)) == count
    assert "bands and bars are ±" in few.caption
    assert "2 seeds; bars are ±" in many_more.caption


def test_a_long_name_is_broken_behind_an_underscore_and_stays_the_same() -> None:
    name = "a_method_with_a_very_long_name (block 11)"
    title = drawn([run(name, 1, level(50, 60, 40))])["forgetting"].figure.axes[0].get_title()
    assert title.replace("\n", "").replace(" ", "") == f"{name}50.0".replace(" ", "")
    assert max(map(len, title.splitlines())) <= 26 + len("  50.0")


def test_numbers_beside_points_hide_neither_each_other_nor_a_point() -> None:
    close = [run(f"method {k:02}", 1, level(50, 50 + k // 8, 50 + k // 8), mib=5 + k // 4) for k in range(16)]
    figure = drawn(close)["accuracy_by_bytes"].figure
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (axes,) = figure.axes
    assert sorted(int(text.get_text()) for text in axes.texts) == list(range(1, 17))
    # Of the text alone, without its line to the point.
    boxes = [Text.get_window_extent(text, canvas.get_renderer()) for text in axes.texts]
    for one_box, other in combinations(boxes, 2):
        assert not one_box.overlaps(other)
    for box in boxes:
        for line in axes.lines:
            if len(line.get_xdata()) == 1:
                assert not box.contains(*axes.transData.transform(line.get_xydata()[0]))


def test_a_client_without_images_and_a_method_without_numbers_do_no_harm() -> None:
    nothing = Accuracy((), np.nan, np.nan, None, None, (((None, None), (None, None)),))
    found = drawn(
        [make_run("nothing", accuracy=dict.fromkeys(MASKS, nothing), setting="made", backbone="vit"), *METHODS]
    )
    assert [axes.get_title() for axes in found["forgetting"].figure.axes] == [
        "better*  66.8",
        "worse  30.0",
        "nothing  nan",
    ]
    (axes,) = found["accuracy_by_bytes"].figure.axes
    assert sorted(text.get_text() for text in axes.texts) == ["1", "2"]


def many() -> list[Run]:
    """16 methods, 12 blocks, 4 buffers and a federation of different CNNs, over three seeds."""
    rng = np.random.default_rng(0)

    def matrix() -> Matrix:
        values = rng.uniform(20, 100, (2, 3, 3))
        return [[[values[i, n, m] if m <= n else None for m in range(3)] for n in range(3)] for i in range(2)]

    options: list[tuple[str, Mapping[str, Any]]] = [
        *(("fed_lscl", {"block": block}) for block in range(12)),
        *(("fed_lscl", {"buffer_size": size}) for size in (1, 5, 50)),
        ("fed_lscl", {"cnn": ["resnet18", "vgg16"]}),
        *((f"method {k:02}", {"mib": k / 3}) for k in range(15)),
    ]
    return [run(method, seed, matrix(), **fields) for method, fields in options for seed in (1, 2, 3)]


def test_accuracy_over_epsilon_stands_beside_that_without_noise() -> None:
    def ridge(seed: int, final: float, epsilon: float | None = None) -> Run:
        found = run("ridge", seed, level(final, final, final))
        if epsilon is None:
            return found
        found.summary.config["model"]["init_args"]["privacy"] = {"epsilon": epsilon, "delta": 1e-5}
        promise = Promise(epsilon, 1e-5, "image", "system", "sum", 1.08, 1)
        return Run(found.path, replace(found.summary, privacy=promise))

    plain = [ridge(seed, 90 + seed) for seed in (0, 2)]
    assert "accuracy_by_epsilon" not in drawn(plain)
    runs = [ridge(seed, 60 + 10 * epsilon + seed, epsilon) for epsilon in (2.0, 1.0) for seed in (0, 2)]
    picture = drawn([*runs, *plain])["accuracy_by_epsilon"]
    over, beside = picture.figure.axes
    assert lines(over) == {"ridge": ([1.0, 2.0], [71.0, 81.0])}
    off = 2**0.5
    assert np.allclose(bars(over), [[1, 71 - off, 71 + off], [2, 81 - off, 81 + off]])
    assert np.allclose(bars(beside), [[0, 91 - off, 91 + off]])
    assert "promised to each image, delta 1e-05" in picture.caption
    assert len(drawn(runs)["accuracy_by_epsilon"].figure.axes) == 1


@pytest.fixture(scope="module")
def all_pictures() -> dict[str, Picture]:
    return drawn(many())


def test_twelve_blocks_are_told_apart_by_shape_and_dash_and_get_lighter(all_pictures: dict[str, Picture]) -> None:
    blocks = all_pictures["accuracy_by_block"].figure.axes[0].lines
    assert len({(line.get_marker(), line.get_linestyle()) for line in blocks}) == 12
    grey = [np.dot(to_rgb(line.get_color()), (0.299, 0.587, 0.114)) for line in blocks]
    assert (np.diff(grey) > 0.02).all()


def test_every_axis_says_what_it_shows_and_in_which_unit(all_pictures: dict[str, Picture]) -> None:
    order = [
        "accuracy_by_method",
        "accuracy_by_block",
        "accuracy_by_buffer",
        "clients_by_task",
        "forgetting",
        "accuracy_by_bytes",
    ]
    assert list(all_pictures) == order
    for name, picture in all_pictures.items():
        assert "made (vit; test images)" in picture.title
        assert "%" in picture.caption
        labels = [axes.get_ylabel() + axes.get_xlabel() for axes in picture.figure.axes]
        assert any("(%)" in label for label in labels), name
        if name not in ("accuracy_by_method", "forgetting", "accuracy_by_bytes"):  # names, and axes that share labels
            assert all(labels), name


def test_files_are_named_after_the_picture_and_the_same_each_time(
    tmp_path: Path, all_pictures: dict[str, Picture]
) -> None:
    for picture, again in zip(all_pictures.values(), pictures(one(many())), strict=True):
        files = save(picture, tmp_path)
        assert [file.name for file in files] == [f"{picture.name}.png", f"{picture.name}.svg"]
        before = [file.read_bytes() for file in files]
        assert [file.read_bytes() for file in save(again, tmp_path)] == before
        with Image.open(files[0]) as image:
            image.load()
            assert image.format == "PNG"
            assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
            assert image.size == pytest.approx(picture.figure.get_size_inches() * 150, abs=1)
            assert image.info["Description"] == picture.caption
        root = ElementTree.fromstring(before[1])
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        words = {"".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")}
        assert any("(%)" in word for word in words)
        assert b"<dc:date>" not in before[1]
        style = root.find(".//{http://www.w3.org/2000/svg}style")
        assert style is not None
        assert f"svg {{fill: {INK}}}" in str(style.text)  # letters on a dark page
        assert f'[style*="fill: #ffffff"]:not([id^="{ON_COLOUR}"] *) {{fill: {PAGE} !important}}' in str(style.text)
        numbered = [node for node in root.iter() if node.get("id", "").startswith(ON_COLOUR)]
        assert bool(numbered) == (picture.name == "clients_by_task")
    assert len(list(tmp_path.iterdir())) == 12
    assert not pyplot.get_fignums()


@pytest.mark.parametrize("step", ["draw", "write"])
def test_a_picture_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    picture = drawn(METHODS)["forgetting"]
    files = save(picture, tmp_path)
    before = [file.read_bytes() for file in files]

    def broken(*args: Any, **options: Any) -> None:
        raise OSError("disk full")

    if step == "draw":
        monkeypatch.setattr(Figure, "savefig", broken)
    else:
        picture.figure.text(0, 0, "other than before")
        monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="disk full"):
        save(picture, tmp_path)
    assert [file.read_bytes() for file in files] == before
    assert len(list(tmp_path.iterdir())) == 2
