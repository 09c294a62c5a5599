"""The pages in docs/: every method has one, with the same sections, and what they point to is there."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedlscl.cli import main
from fedlscl.models import hub
from fedlscl.models.create import create

ROOT = Path(__file__).parent.parent
METHODS = ROOT / "docs" / "methods"
CONFIGURATIONS = sorted((ROOT / "experiments" / "methods").glob("*.yaml"))
SECTIONS = ["Published", "Followed", "Ours", "What travels", "Log names"]
SOURCES = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "fedlscl").rglob("*.py"))}
DOCSTRINGS = [ast.get_docstring(ast.parse(text)) or "" for text in SOURCES.values()]
WRITTEN = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / "docs").glob("*.ipynb"),
]


def table() -> dict[str, list[str]]:
    """The cells of each method's row by its name."""
    lines = (METHODS / "README.md").read_text(encoding="utf-8").splitlines()
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {cells[0].strip("`"): cells for cells in found}


def page_of(cells: list[str]) -> str:
    link = re.fullmatch(r"\[.+\]\((\w+\.md)\)", cells[1])
    assert link, cells[1]
    return link[1]


PAGES = sorted({page_of(cells) for cells in table().values()})


def written(page: str) -> str:
    return (METHODS / page).read_text(encoding="utf-8")


def test_every_configuration_is_in_the_table_and_nothing_else() -> None:
    assert set(table()) == {path.stem for path in CONFIGURATIONS}
    assert {path.name for path in METHODS.glob("*.md")} == {*PAGES, "README.md"}


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda path: path.stem)
def test_the_table_names_the_classes_of_a_configuration(configuration: Path) -> None:
    cells = table()[configuration.stem]
    settings: dict[str, Any] = yaml.safe_load(configuration.read_text(encoding="utf-8"))
    classes = [settings[part]["class_path"].rpartition(".")[2] for part in ("model", "server")]
    assert cells[3] == " ".join(f"`{name}`" for name in classes)
    assert f"experiments/methods/{configuration.name}" in written(page_of(cells))


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_all_sections(page: str) -> None:
    assert re.findall(r"^## (.+)$", written(page), re.MULTILINE) == SECTIONS


@pytest.mark.parametrize("page", PAGES)
def test_logged_names_are_in_the_code(page: str) -> None:
    section = written(page).partition("## Log names")[2]
    names = re.findall(r"`(?:collaborate|replay|global|local|server|detection|o2d|gradient|generated)/(\w+)`", section)
    assert names
    code = "\n".join(SOURCES.values())
    assert [name for name in names if not re.search(rf'["/]{name}"', code)] == []


@pytest.mark.parametrize("page", PAGES)
def test_a_docstring_is_short_and_points_to_the_page(page: str) -> None:
    pointing = [text for text in DOCSTRINGS if f"docs/methods/{page}" in text]
    assert pointing
    assert all(len(text.splitlines()) <= 20 for text in pointing)


@pytest.mark.parametrize("document", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_point_to_what_is_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert [target for target in targets if target and not (document.parent / target).exists()] == []


def test_first_mistakes_are_told_as_their_page_says(
    command_line: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "mistakes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(fedlscl .+?)` \| `+ ?(.+?) ?`+ \|$", page, re.MULTILINE)
    assert len(rows) == 10
    for command, told in rows:
        with pytest.raises(SystemExit) as end:
            main(shlex.split(command)[1:])
        said = f"{capsys.readouterr().err}{end.value.code if isinstance(end.value.code, str) else ''}"
        assert said.removeprefix("fedlscl: ").strip() == told

    monkeypatch.setattr(hub, "cached", lambda repository: False)
    monkeypatch.setattr(hub, "unreachable", lambda repository: "[Errno -2] Name or service not known")
    with pytest.raises(ValueError, match="give a file of them") as refused:
        create("backbone", "vit_base_patch16_224", True, {})
    assert str(refused.value) in " ".join(page.split())
