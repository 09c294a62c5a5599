"""The page on finished runs: it shows all of them, escapes what they say, and asks for nothing from outside."""

from __future__ import annotations

import base64
import hashlib
import html
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from made_runs import paper_run
from matplotlib.figure import Figure

from fedlscl import files
from fedlscl.analysis import report, schemes
from fedlscl.analysis.captions import Picture
from fedlscl.analysis.comparison import Comparison, compare
from fedlscl.analysis.deviations import OPEN, POINTS, data_set, differences, texts
from fedlscl.analysis.formats import Cell, Table
from fedlscl.analysis.report import inline_svg, write_report
from fedlscl.analysis.results import Run
from fedlscl.analysis.schemes import both, contrast, dark
from fedlscl.analysis.tables import tables
from fedlscl.run.plots import heat_map
from fedlscl.run.summary import Skipped

VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}


def only(*runs: Run) -> Comparison:
    (comparison,) = compare(runs)
    return comparison


class Page(HTMLParser):
    """A page taken apart, which fails where elements are not properly nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[list[str]]] = []
        self.pre: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag} has an attribute twice"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "pre":
            self.pre.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open, f"HTML has no self-closing {tag}"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open or "script" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data
        if "pre" in self.open:
            self.pre[-1] += data

    def all(self, attribute: str) -> list[str]:
        return [attributes[attribute] for _, attributes in self.elements if attribute in attributes]

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def parse(comparisons: Sequence[Comparison], folder: Path) -> Page:
    path = folder / "report.html"
    write_report(comparisons, path)
    text = path.read_text()
    assert text.startswith("<!doctype html>")
    return Page(text)


def draw(width: float = 4.0) -> Figure:
    """A figure with what has ids and references: a clip path, markers, an image, letters."""
    figure = Figure(figsize=(width, 3.0))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], marker="o", label="a line")
    axes.imshow(np.eye(2))
    axes.legend()
    return figure


@pytest.fixture(scope="module")
def sweep() -> list[Comparison]:
    """Two settings; in the first one Fed-LSCL with three seeds and another block, and a method beside it."""
    runs = [paper_run(seed=seed, average=90 + n) for n, seed in enumerate((42, 1999, 2024))]
    runs += [paper_run(average=80, config={"model.block": 7}), paper_run("fedavg", average=40)]
    return compare([*runs, paper_run("local", average=70, setting="elsewhere")])


def test_the_page_is_well_formed_and_refers_to_nothing_outside(sweep: list[Comparison], tmp_path: Path) -> None:
    page = parse(sweep, tmp_path)
    ids = page.all("id")
    assert len(ids) == len(set(ids))
    references = page.all("href") + page.all("src")
    assert all(reference.startswith(("#", "data:")) for reference in references)
    assert {reference[1:] for reference in references if reference.startswith("#")} <= set(ids)
    for attribute in ("aria-labelledby", "aria-describedby"):
        assert set(page.all(attribute)) <= set(ids)
    assert page.count("script") == 1  # which sorts tables
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    written = (tmp_path / "report.html").read_text()
    assert not re.search(r"@import|url\((?!#)", written)
    (policy,) = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    (script,) = re.findall(r"<script>(.*?)</script>", written, re.DOTALL)
    sha256 = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert re.findall(r"script-src ([^;]*);", policy) == [f"'sha256-{sha256}'"]


def test_every_table_is_there_cell_by_cell_with_its_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = (Cell("a method"), Cell("1.5 ± 0.1", "best"), Cell("–"), Cell("3 KiB", "second"), Cell("no"))
    table = Table(
        "t", "A title", "a setting", "A note & more. And more.", ("name", "one", "two", "three", "four"), (row,)
    )
    empty = Table("e", "Empty", "", "", ("name", "value"), ())
    monkeypatch.setattr(report, "tables", lambda comparison: [table, empty])
    monkeypatch.setattr(report, "pictures", lambda comparison, **how: [])
    page = parse([only(paper_run())], tmp_path)
    shown = [[[cell.strip() for cell in cells] for cells in rows] for rows in page.tables]
    assert shown[0] == [list(table.header), [cell.text for cell in row]]
    assert shown[1] == [["name", "value"]]
    assert " ".join(page.text.split()).count("A note & more.And more.") == 1
    written = (tmp_path / "report.html").read_text()
    assert re.search(r'<td class="number best"><strong>1\.5 ± 0\.1</strong></td>', written)
    assert "<em>3 KiB</em>" in written
    classes = [a.get("class", "") for tag, a in page.elements if tag in ("th", "td") and "scope" in a]
    assert classes[:5] == ["", "number", "number", "number", ""]


def test_the_tables_of_the_runs_are_shown(sweep: list[Comparison], tmp_path: Path) -> None:
    page = parse(sweep, tmp_path)
    shown = [[[cell.strip() for cell in cells] for cells in rows] for rows in page.tables]
    for comparison in sweep:
        for table in tables(comparison):
            rows = [list(table.header), *([cell.text for cell in row] for row in table.rows)]
            # what was found comes first, for a phone
            place = {column: name in ("seeds", "images kept", "epsilon") for column, name in enumerate(table.header)}
            order = [column for last in (False, True) for column in place if place[column] is last]
            assert [[row[column] for column in order] for row in rows] in shown
            assert table.title in page.text
    assert "**" not in page.text


def test_every_run_is_there_with_its_configuration(tmp_path: Path) -> None:
    cost = {"seconds": {"total": 61.5, "fit": 50.0, "evaluate": 11.5}, "peak_memory_mib": 1234.4}
    source = {"class_path": "a.B", "root": "größe"}
    run = paper_run("fedavg", average=71.26, config={"data.source": source}, task_aware=("task",), **cost)
    other = paper_run(seed=1999, skipped=(Skipped(3, 4, "RuntimeError: lost"),), machine="a GPU")
    page = parse([only(paper_run(), other, run)], tmp_path)
    assert page.all("class").count("run") == 3
    assert [yaml.safe_load(text)["method"] for text in page.pre] == ["fed_lscl", "fed_lscl", "fedavg"]
    assert [yaml.safe_load(text) for text in page.pre][2] == run.config
    said = " ".join(page.text.split())
    for text in (
        "71.3* %",
        "61.3 %",
        "51.3 %",
        "250.0 KiB",
        "2.0 KiB per client and round",
        "61.5 (fit 50.0, evaluate",
    ):
        assert text in said
    assert "round 3, client 4: RuntimeError: lost" in said
    assert "1234 MiB" in said
    assert "runs/fedavg-42/summary.json" in said
    assert "3 runs of 2 methods" in said
    assert "Linux x86_64, 2 threads; a GPU" in said
    assert "torch 2.15.0" in said


def test_what_runs_say_is_never_markup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = "<script>alert('x')</script>\"&"
    changes: dict[str, Any] = {"machine": bad, "versions": {bad: bad}, "evaluated_on": bad, "backbone": bad, "cnn": bad}
    config = {"cnn.name": [bad], "model.train_mask": bad}
    run = paper_run(bad, setting=bad, config=config, skipped=(Skipped(1, 0, bad),), **changes)
    run = Run(Path(bad), run.summary)
    table = Table(bad, bad, bad, bad, (bad,), ((Cell(bad, "best"),),))
    monkeypatch.setattr(report, "tables", lambda comparison: [table])
    monkeypatch.setattr(report, "pictures", lambda comparison, **how: [Picture(bad, bad, bad, draw())])
    page = parse([only(run)], tmp_path)
    assert page.count("script") == 1
    assert page.text.count(bad) > 15
    assert [[cell.strip() for cell in cells] for cells in page.tables[0]] == [[bad], [bad]]
    assert [a["aria-label"] for tag, a in page.elements if tag == "svg"] == [bad]


def test_figures_do_not_share_ids_and_are_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Twice the same figure: the same ids, were they not made different.
    figures = [Picture("one", "First", "What is seen.", draw()), Picture("two", "Second", "The same again.", draw())]
    monkeypatch.setattr(report, "pictures", lambda comparison, **how: figures)
    monkeypatch.setattr(report, "tables", lambda comparison: [])
    page = parse([only(paper_run())], tmp_path)
    ids = page.all("id")
    assert len(ids) == len(set(ids))
    drawings = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert [drawing["role"] for drawing in drawings] == ["img", "img"]
    assert [drawing["aria-label"] for drawing in drawings] == ["First", "Second"]
    captions = [attributes["id"] for tag, attributes in page.elements if tag == "figcaption"]
    assert [drawing["aria-describedby"] for drawing in drawings] == captions
    assert "What is seen." in page.text


def test_what_a_drawing_refers_to_is_in_it() -> None:
    svg = str(inline_svg(draw(), "x-", "a label", "caption"))
    page = Page(svg)
    ids = set(page.all("id"))
    assert all(name.startswith("x-") for name in ids)
    used = re.findall(r"url\(#([^)]*)\)", svg) + [name[1:] for name in page.all("href") if name.startswith("#")]
    assert used
    assert set(used) <= ids
    assert any(name.startswith("data:image/png;base64,") for name in page.all("href"))
    assert page.count("style") == page.count("metadata") == 0
    assert svg == str(inline_svg(draw(), "x-", "a label", "caption"))


def test_what_is_drawn_is_seen_on_a_light_and_on_a_dark_page() -> None:
    for colour in ("#440154", "#0072b2", "#e69f00", "#fde725", "#3b0000"):
        assert contrast(dark(colour), schemes.PAGE) >= 3
    assert dark("#e69f00") == "#e69f00"  # bright enough as it is
    assert [dark("#ffffff"), dark("#000000")] == [schemes.PAGE, schemes.INK]
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    followed = f"stroke: #ffffff; stroke: light-dark(#ffffff, {schemes.PAGE})"
    assert both("fill: none; stroke: #ffffff") == f"fill: none; {followed}"
    template = (Path(report.__file__).parent / report.TEMPLATE).read_text()
    assert f"--page: {schemes.PAGE};" in template
    assert f"--ink: {schemes.INK};" in template


def test_numbers_in_coloured_cells_keep_their_ink() -> None:
    figure = Figure()
    axes = figure.subplots()
    heat_map(axes, np.array([[10.0, 90.0]]), ["a"], ["b", "c"])
    root = ET.fromstring(str(inline_svg(figure, "x-", "a label", "caption")))
    cells = [group for group in root.iter("g") if group.get("id", "").startswith("x-on-colour-")]
    painted = [[each.get("style") for each in cell.iter("g") if each.get("style")] for cell in cells]
    assert [styles[-1].split(";")[0] for styles in painted] == ["fill: #ffffff", "fill: #000000"]
    assert not any("light-dark" in style for styles in painted for style in styles)


def test_a_run_of_the_papers_protocol_differs_in_its_seeds_only() -> None:
    (seeds,), same = differences(only(paper_run()).variants)
    assert (seeds.label, seeds.paper, seeds.here, seeds.in_part) == ("seeds", "42, 1999, 2024", "42", False)
    assert "private classes per client (15)" in same
    assert "foundation model (ViT-B/16)" in same
    nothing, same = differences(only(*(paper_run(seed=seed) for seed in (2024, 42, 1999))).variants)
    assert nothing == []
    assert "seeds (42, 1999, 2024)" in same


@pytest.mark.parametrize(
    ("change", "label", "paper", "here"),
    [
        ({"data.split.clients": 10}, "clients", "5", "10"),
        ({"data.split.tasks": 3}, "tasks", "5", "3"),
        ({"data.split.classes_per_task": 2}, "classes per task", "8", "2"),
        ({"data.split.private_classes": 40}, "private classes per client", "15", "40"),
        ({"data.split.public_classes": 0}, "public classes", "25", "0"),
        ({"data.split.train_per_class": 20}, "training images per class", "all", "20"),
        ({"federation.rounds": 3}, "rounds per task", "5", "3"),
        ({"federation.clients_per_round": 2}, "clients in a round", "all", "2"),
        ({"model.epochs": 1}, "epochs per round", "5", "1"),
        ({"model.learning_rate": 0.01}, "learning rate (Adam)", "0.001", "0.01"),
        ({"model.buffer_size": 10}, "images kept of each class", "20", "10"),
        ({"model.block": 0}, "adapted block of the ViT", "3", "0"),
        ({"backbone.image_size": 160}, "image size of the ViT", "224 px", "160 px"),
        ({"backbone.name": "vit_tiny_patch16_224"}, "foundation model", "ViT-B/16", "vit_tiny_patch16_224"),
        (
            {"backbone.name": "vit_base_patch16_224", "backbone.model_args": {"patch_size": 8, "depth": 2}},
            "foundation model",
            "ViT-B/16",
            "vit_base_patch16_224 (patch_size 8; depth 2)",
        ),
        (
            {"cnn.model_args": {"channels": [4, 8], "norm_layer": "groupnorm"}},
            "small model",
            "ResNet-18",
            "resnet18 (channels 4, 8; norm_layer groupnorm)",
        ),
        ({"cnn.name": ["resnet18", "vgg16"]}, "small model", "ResNet-18", "resnet18, vgg16"),
        ({"trainer.precision": "bf16-mixed"}, "precision", "32-true", "bf16-mixed"),
    ],
)
def test_each_difference_from_the_paper_is_named(change: dict[str, Any], label: str, paper: str, here: str) -> None:
    runs = [paper_run(seed=seed, config=change) for seed in (42, 1999, 2024)]
    (found,), same = differences(only(*runs).variants)
    assert (found.label, found.paper, found.here, found.in_part) == (label, paper, here, False)
    assert found.why
    assert not [text for text in same if text.startswith(f"{label} (")]


def test_the_protocol_is_that_of_the_data_set() -> None:
    def fields(source: dict[str, Any], private: int, public: int) -> dict[str, tuple[str, str]]:
        changes = {"data.split.private_classes": private, "data.split.public_classes": public, "data.source": source}
        runs = [paper_run(seed=seed, config=changes) for seed in (42, 1999, 2024)]
        found, _ = differences(only(*runs).variants)
        return {difference.label: (difference.paper, difference.here) for difference in found}

    imagenet = {"class_path": "ImageNetR", "init_args": {"root": "imagenet-r.tar"}}
    assert fields(imagenet, 40, 0) == {}
    assert fields(imagenet, 15, 25) == {"private classes per client": ("40", "15"), "public classes": ("0", "25")}
    folder = {"class_path": "ImageFolder", "init_args": {"root": "x", "name": "cifar100"}}
    assert fields(folder, 15, 25) == {}
    digits = {"class_path": "Digits"}
    assert fields(digits, 1, 5) == {
        "data set": ("CIFAR-100 or ImageNet-R", "Digits"),
        "private classes per client": ("15 or 40", "1"),
        "public classes": ("25 or 0", "5"),
    }


SHORT = {
    "model.class_path": "FedLSCL",
    "model.continual.class_path": "Replay",
    "data.source.class_path": "CIFAR100",
    "server.class_path": "ExactO2D",
}


def test_classes_are_known_with_and_without_their_modules() -> None:
    long, short = paper_run(), paper_run(config=SHORT)
    for points in (POINTS, OPEN):
        assert texts(points, only(short).variants) == texts(points, only(long).variants)
    assert texts(POINTS, only(short).variants)["data set"] == "CIFAR-100"
    assert "rank of its LoRA" in texts(POINTS, only(short).variants)
    assert data_set(only(short).variants[0]) == "CIFAR-100"
    other = only(paper_run(config=SHORT | {"model.class_path": "FedProxClient"}))
    assert "rank of its LoRA" not in texts(POINTS, other.variants)


def test_where_runs_differ_each_value_is_counted() -> None:
    runs = [paper_run(seed=seed) for seed in (42, 1999, 2024)]
    runs += [paper_run(seed=42, config={"model.block": block}) for block in (11, 0)]
    runs += [
        paper_run(
            "fedavg", config={"model": {"class_path": "fedlscl.methods.small_model.SmallModelClient", "block": 5}}
        )
    ]
    found, _ = differences(only(*runs).variants)
    by_label = {difference.label: difference for difference in found}
    assert set(by_label) == {"adapted block of the ViT", "seeds"}
    block = by_label["adapted block of the ViT"]
    assert (block.here, block.in_part, block.stated) == ("0 (1 run); 3 (3 runs); 11 (1 run)", True, False)
    assert by_label["seeds"].here == "42 (3 configurations); 42, 1999, 2024 (1 configuration)"
    assert by_label["seeds"].in_part


def test_settings_of_one_name_are_told_apart(tmp_path: Path) -> None:
    page = parse(compare([paper_run(), paper_run(config={"backbone.image_size": 96})]), tmp_path)
    assert page.text.count("cifar100 (vit_base_patch16_224.augreg_in21k, 96 px; test images)") >= 2


def test_the_page_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    write_report([only(paper_run())], path)
    before = path.read_bytes()
    write_report([only(paper_run())], path)
    assert path.read_bytes() == before  # and the same runs make the same page

    def broken(source: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_report([only(paper_run(average=50))], path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_to_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="comparisons is empty"):
        write_report([], tmp_path / "report.html")


# ----------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.skip(f"no Chromium on this machine: none of {', '.join(names)}")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shown_page(sweep: list[Comparison], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with a name that is too long for a phone, and with some that are about as long as its lines."""
    name = "a_method_whose_name_is_long_enough_to_be_wider_than_any_telephone"
    path = tmp_path_factory.mktemp("report") / "report.html"
    runs = [paper_run(method, setting=name) for method in (name, *("m" * length for length in range(14, 34, 2)))]
    write_report([*sweep, *compare(runs)], path)
    return path


@pytest.fixture
def opened(browser: Any, shown_page: Path) -> Iterator[Callable[[int, str], Any]]:
    """Open the report at a width in a colour scheme; every complaint and request is noted at the page."""
    contexts = []

    def open_page(width: int, scheme: str) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.complaints, page.requests = [], []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto(shown_page.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it(opened: Callable[[int, str], Any], shown_page: Path, width: int, scheme: str) -> None:
    page = opened(width, scheme)
    for details in page.query_selector_all("details"):
        details.evaluate("element => element.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("document.querySelectorAll('svg').length") > 0
    overflowing = "[...document.querySelectorAll('th, td, dt, dd')].filter(e => e.scrollWidth > e.clientWidth + 1)"
    assert page.evaluate(f"{overflowing}.map(element => element.textContent)") == []
    straddling = "e => e.querySelector('.end').getBoundingClientRect().bottom > e.getBoundingClientRect().bottom"
    assert page.evaluate(f"[...document.querySelectorAll('.run > summary')].filter({straddling}).length") == 0
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", background)[:3])) / 3
    assert (brightness > 200) == (scheme == "light")
    assert page.complaints == []
    assert page.requests == [shown_page.as_uri()]


def test_contents_lead_to_what_they_name(opened: Callable[[int, str], Any]) -> None:
    page = opened(390, "light")
    page.click("nav summary")
    page.click(f"nav >> text={html.escape('Every run')} >> nth=0")
    heading = page.locator("h3", has_text="Every run").first
    page.wait_for_function(
        "element => Math.abs(element.getBoundingClientRect().top) < 100", arg=heading.element_handle()
    )


def test_a_click_on_a_head_sorts_and_the_keyboard_too(opened: Callable[[int, str], Any]) -> None:
    page = opened(1280, "light")
    head = page.locator("th:has(button)", has_text="seeds").first
    table = head.locator("xpath=ancestor::table")
    place = 1 + head.evaluate("element => element.cellIndex")

    def shown() -> list[str]:
        return [text.strip() for text in table.locator(f"tbody tr > :nth-child({place})").all_inner_texts()]

    before = shown()
    counts = sorted(int(text) for text in before)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert [int(text) for text in shown()] == counts[::-1]
    page.keyboard.press("Enter")  # the button has the focus
    assert head.get_attribute("aria-sort") == "ascending"
    assert [int(text) for text in shown()] == counts != [int(text) for text in before]
    page.keyboard.press("Enter")
    assert (head.get_attribute("aria-sort"), shown()) == (None, before)
    assert page.complaints == []
