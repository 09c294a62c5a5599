"""The page on finished runs: it shows all of them, escapes what they say, and asks for nothing from outside."""

from __future__ import annotations

import copy
import html
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure

from fedlscl import files
from fedlscl.analysis import report
from fedlscl.analysis.deviations import differences
from fedlscl.analysis.figures import Picture
from fedlscl.analysis.report import inline_svg, write_report
from fedlscl.analysis.results import Comparison, Run, compare
from fedlscl.analysis.tables import Cell, Table, tables

VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}
CONFIG: dict[str, Any] = {
    "seed_everything": 42,
    "trainer": {"precision": "32-true"},
    "model": {
        "class_path": "FedLSCL",
        "init_args": {
            "block": 3,
            "rank": 4,
            "continual": {
                "class_path": "Replay",
                "init_args": {"lambda_e": 0.1, "lambda_w": 0.01, "current": True},
            },
            "learning_rate": 1e-3,
            "epochs": 5,
            "batch_size": 16,
            "buffer_size": 20,
            "train_mask": "seen",
            "snapshot": "deployed",
        },
    },
    "data": {
        "source": {"class_path": "CIFAR100"},
        "split": {
            "clients": 5,
            "tasks": 5,
            "classes_per_task": 8,
            "private_classes": 15,
            "public_classes": 25,
            "dirichlet_alpha": 1.0,
            "train_per_class": None,
            "test_per_class": None,
            "local_test": "official",
        },
    },
    "backbone": {"name": "vit_base_patch16_224.augreg_in21k", "image_size": 224, "model_args": None},
    "cnn": {"name": "resnet18", "image_size": 224, "model_args": None},
    "server": {"class_path": "ExactO2D", "init_args": {"strength": 0.5}},
    "federation": {"rounds": 5, "clients_per_round": None},
    "setting": "cifar100",
    "method": "fed_lscl",
}
"""The paper's protocol on CIFAR-100."""


def make_run(method: str = "fed_lscl", seed: int = 42, average: float = 90.0, **changes: Any) -> Run:
    """A finished run of the paper's protocol; `changes` of its configuration with __ for a dot, as model__block."""
    config = copy.deepcopy(CONFIG) | {"seed_everything": seed, "method": method}
    for name, value in changes.items():
        *groups, field = name.split("__")
        place = config
        for group in groups:
            place = place[group]
            place = place.get("init_args", place) if group == "model" else place
        place[field] = value
    tasks = config["data"]["split"]["tasks"]
    accuracy = {}
    for mask, final in (("task", average), ("seen", average - 10), ("none", average - 20)):
        matrix = [[final if on <= after else None for on in range(tasks)] for after in range(tasks)]
        accuracy[mask] = {
            "table1": [final] * tasks,
            "final_average": final,
            "average_incremental": final,
            "forgetting": 0.0,
            "backward_transfer": 0.0,
            "matrix": [matrix] * 5,
        }
    sent = {"per_client_round": 2048.0, "total": 5 * 25 * 2048, "by_client": [25 * 2048] * 5, "by_round": [[2048] * 5]}
    return Run(
        Path(f"runs/{method}-{seed}-{average:g}/summary.json"),
        {
            "method": method,
            "setting": config["setting"],
            "seed": seed,
            "backbone": f"{config['backbone']['name']}, {config['backbone']['image_size']} px",
            "cnn": "resnet18",
            "task_aware": [],
            "evaluated_on": "test images",
            "accuracy": accuracy,
            "bytes_up": sent,
            "bytes_down": sent,
            "compute": {"resnet18": {"trained_parameters": 1000, "flops_frozen": 10, "flops": 1000}},
            "skipped": [],
            "seconds": {"total": 61.5, "fit": 50.0, "evaluate": 11.5},
            "peak_memory_mib": 1234.4,
            "machine": "Linux x86_64, 2 threads",
            "versions": {"python": "3.11.7", "torch": "2.15.0"},
            "config": config,
        },
    )


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
        if "style" in self.open:
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


@pytest.fixture
def sweep() -> list[Comparison]:
    """Two settings; in the first one Fed-LSCL with three seeds and another block, and a method beside it."""
    runs = [make_run(seed=seed, average=90 + n) for n, seed in enumerate((42, 1999, 2024))]
    runs += [make_run(average=80, model__block=7), make_run("fedavg", average=40)]
    return compare([*runs, make_run("local", average=70, setting="elsewhere")])


def test_the_page_is_well_formed_and_refers_to_nothing_outside(sweep: list[Comparison], tmp_path: Path) -> None:
    page = parse(sweep, tmp_path)
    ids = page.all("id")
    assert len(ids) == len(set(ids))
    references = page.all("href") + page.all("src")
    assert all(reference.startswith(("#", "data:")) for reference in references)
    assert {reference[1:] for reference in references if reference.startswith("#")} <= set(ids)
    for attribute in ("aria-labelledby", "aria-describedby"):
        assert set(page.all(attribute)) <= set(ids)
    assert page.count("script") == 0
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    written = (tmp_path / "report.html").read_text()
    assert not re.search(r"@import|url\((?!#)", written)
    (policy,) = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert "script" not in policy


def test_every_table_is_there_cell_by_cell_with_its_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = (Cell("a method"), Cell("1.5 ± 0.1", "best"), Cell("–"), Cell("3 KiB", "second"), Cell("no"))
    table = Table("t", "A title", "a setting", "A note & more.", ("name", "one", "two", "three", "four"), (row,))
    empty = Table("e", "Empty", "", "", ("name", "value"), ())
    monkeypatch.setattr(report, "tables", lambda comparison: [table, empty])
    monkeypatch.setattr(report, "pictures", lambda comparison: [])
    page = parse([only(make_run())], tmp_path)
    shown = [[[cell.strip() for cell in cells] for cells in rows] for rows in page.tables]
    assert shown[0] == [list(table.header), [cell.text for cell in row]]
    assert shown[1] == [["name", "value"]]
    assert "A note & more." in page.text
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
            assert [list(table.header), *([cell.text for cell in row] for row in table.rows)] in shown
            assert table.title in page.text
    assert "**" not in page.text


def test_every_run_is_there_with_its_configuration(tmp_path: Path) -> None:
    run = make_run("fedavg", average=71.26, data__source={"class_path": "a.B", "root": "größe"})
    run = Run(run.path, {**run.summary, "task_aware": ["task"]})
    skipped = [{"round": 3, "client": 4, "reason": "RuntimeError: lost"}]
    other = make_run(seed=1999)
    other = Run(other.path, {**other.summary, "skipped": skipped, "machine": "a GPU"})
    page = parse([only(make_run(), other, run)], tmp_path)
    assert page.count("details") == 1 + 3
    assert [yaml.safe_load(text)["method"] for text in page.pre] == ["fed_lscl", "fed_lscl", "fedavg"]
    assert [yaml.safe_load(text) for text in page.pre][2] == run.summary["config"]
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
    assert "runs/fedavg-42-71.26/summary.json" in said
    assert "3 runs of 2 methods" in said
    assert "Linux x86_64, 2 threads; a GPU" in said
    assert "torch 2.15.0" in said


def test_what_runs_say_is_never_markup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = "<script>alert('x')</script>\"&"
    skipped = [{"round": 1, "client": 0, "reason": bad}]
    run = make_run(bad, setting=bad, cnn__name=[bad], model__train_mask=bad)
    changes = {"skipped": skipped, "machine": bad, "versions": {bad: bad}, "evaluated_on": bad, "backbone": bad}
    run = Run(Path(bad), {**run.summary, **changes, "cnn": bad})
    table = Table(bad, bad, bad, bad, (bad,), ((Cell(bad, "best"),),))
    monkeypatch.setattr(report, "tables", lambda comparison: [table])
    monkeypatch.setattr(report, "pictures", lambda comparison: [Picture(bad, bad, bad, draw())])
    page = parse([only(run)], tmp_path)
    assert page.count("script") == 0
    assert page.text.count(bad) > 15
    assert [[cell.strip() for cell in cells] for cells in page.tables[0]] == [[bad], [bad]]
    assert [a["aria-label"] for tag, a in page.elements if tag == "svg"] == [bad]


def test_figures_do_not_share_ids_and_are_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Twice the same figure: the same ids, were they not made different.
    figures = [Picture("one", "First", "What is seen.", draw()), Picture("two", "Second", "The same again.", draw())]
    monkeypatch.setattr(report, "pictures", lambda comparison: figures)
    monkeypatch.setattr(report, "tables", lambda comparison: [])
    page = parse([only(make_run())], tmp_path)
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


def test_a_run_of_the_papers_protocol_differs_in_its_seeds_only() -> None:
    (seeds,), same = differences(only(make_run()).variants)
    assert (seeds.label, seeds.paper, seeds.here, seeds.in_part) == ("seeds", "42, 1999, 2024", "42", False)
    assert "private classes per client (15)" in same
    assert "foundation model (ViT-B/16)" in same
    nothing, same = differences(only(*(make_run(seed=seed) for seed in (2024, 42, 1999))).variants)
    assert nothing == []
    assert "seeds (42, 1999, 2024)" in same


@pytest.mark.parametrize(
    ("change", "label", "paper", "here"),
    [
        ({"data__split__clients": 10}, "clients", "5", "10"),
        ({"data__split__tasks": 3}, "tasks", "5", "3"),
        ({"data__split__classes_per_task": 2}, "classes per task", "8", "2"),
        ({"data__split__private_classes": 40}, "private classes per client", "15", "40"),
        ({"data__split__public_classes": 0}, "public classes", "25", "0"),
        ({"data__split__train_per_class": 20}, "training images per class", "all", "20"),
        ({"federation__rounds": 3}, "rounds per task", "5", "3"),
        ({"federation__clients_per_round": 2}, "clients in a round", "all", "2"),
        ({"model__epochs": 1}, "epochs per round", "5", "1"),
        ({"model__learning_rate": 0.01}, "learning rate (Adam)", "0.001", "0.01"),
        ({"model__buffer_size": 10}, "images kept of each class", "20", "10"),
        ({"model__block": 0}, "adapted block of the ViT", "3", "0"),
        ({"backbone__image_size": 160}, "image size of the ViT", "224 px", "160 px"),
        ({"backbone__name": "vit_tiny_patch16_224"}, "foundation model", "ViT-B/16", "vit_tiny_patch16_224"),
        (
            {"backbone__name": "vit_base_patch16_224", "backbone__model_args": {"patch_size": 8, "depth": 2}},
            "foundation model",
            "ViT-B/16",
            "vit_base_patch16_224 (patch_size 8; depth 2)",
        ),
        (
            {"cnn__model_args": {"channels": [4, 8], "norm_layer": "groupnorm"}},
            "small model",
            "ResNet-18",
            "resnet18 (channels 4, 8; norm_layer groupnorm)",
        ),
        ({"cnn__name": ["resnet18", "vgg16"]}, "small model", "ResNet-18", "resnet18, vgg16"),
        ({"trainer__precision": "bf16-mixed"}, "precision", "32-true", "bf16-mixed"),
    ],
)
def test_each_difference_from_the_paper_is_named(change: dict[str, Any], label: str, paper: str, here: str) -> None:
    runs = [make_run(seed=seed, **change) for seed in (42, 1999, 2024)]
    (found,), same = differences(only(*runs).variants)
    assert (found.label, found.paper, found.here, found.in_part) == (label, paper, here, False)
    assert found.why
    assert not [text for text in same if text.startswith(f"{label} (")]


def test_the_protocol_is_that_of_the_data_set() -> None:
    def fields(source: dict[str, Any], private: int, public: int) -> dict[str, tuple[str, str]]:
        split = {"data__split__private_classes": private, "data__split__public_classes": public}
        runs = [make_run(seed=seed, data__source=source, **split) for seed in (42, 1999, 2024)]
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


def test_where_runs_differ_each_value_is_counted() -> None:
    runs = [make_run(seed=seed) for seed in (42, 1999, 2024)]
    runs += [make_run(seed=42, model__block=block) for block in (11, 0)]
    runs += [make_run("fedavg", model={"class_path": "SmallModelClient", "block": 5})]
    found, _ = differences(only(*runs).variants)
    by_label = {difference.label: difference for difference in found}
    assert set(by_label) == {"adapted block of the ViT", "seeds"}
    block = by_label["adapted block of the ViT"]
    assert (block.here, block.in_part, block.stated) == ("0 (1 run); 3 (3 runs); 11 (1 run)", True, False)
    assert by_label["seeds"].here == "42 (3 configurations); 42, 1999, 2024 (1 configuration)"
    assert by_label["seeds"].in_part


def test_settings_of_one_name_are_told_apart(tmp_path: Path) -> None:
    page = parse(compare([make_run(), make_run(backbone__image_size=96)]), tmp_path)
    assert page.text.count("cifar100 (vit_base_patch16_224.augreg_in21k, 96 px; test images)") >= 2


def test_the_page_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    write_report([only(make_run())], path)
    before = path.read_bytes()
    write_report([only(make_run())], path)
    assert path.read_bytes() == before  # and the same runs make the same page

    def broken(source: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_report([only(make_run(average=50))], path)
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


@pytest.fixture
def opened(browser: Any, sweep: list[Comparison], tmp_path: Path) -> Iterator[Callable[[int, str], Any]]:
    """Open the report at a width in a colour scheme; every complaint and request is noted at the page."""
    name = "a_method_whose_name_is_long_enough_to_be_wider_than_any_telephone"
    path = tmp_path / "report.html"
    write_report([*sweep, *compare([make_run(name, setting=name)])], path)
    contexts = []

    def open_page(width: int, scheme: str) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.complaints, page.requests = [], []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it(opened: Callable[[int, str], Any], tmp_path: Path, width: int, scheme: str) -> None:
    page = opened(width, scheme)
    for details in page.query_selector_all("details"):
        details.evaluate("element => element.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("document.querySelectorAll('svg').length") > 0
    overflowing = "[...document.querySelectorAll('th, td, dt, dd')].filter(e => e.scrollWidth > e.clientWidth + 1)"
    assert page.evaluate(f"{overflowing}.map(element => element.textContent)") == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", background)[:3])) / 3
    assert (brightness > 200) == (scheme == "light")
    assert page.complaints == []
    assert page.requests == [(tmp_path / "report.html").as_uri()]


def test_contents_lead_to_what_they_name(opened: Callable[[int, str], Any]) -> None:
    page = opened(390, "light")
    page.click("nav summary")
    page.click(f"nav >> text={html.escape('Every run')} >> nth=0")
    heading = page.locator("h3", has_text="Every run").first
    page.wait_for_function(
        "element => Math.abs(element.getBoundingClientRect().top) < 100", arg=heading.element_handle()
    )
