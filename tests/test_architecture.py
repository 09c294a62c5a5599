"""Imports go one way, nobody knows a method, and nothing is ever unpickled: read off the source text."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import fedlscl

ROOT = Path(fedlscl.__file__).parent
FILES = {
    ".".join(("fedlscl", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
SPINE = (
    *("seeds", "files", "checks", "privacy", "classes", "losses", "messages", "schedule", "evaluation", "memory"),
    *("batches", "continual", "client_model", "client_inference", "client", "robust", "server"),
)
"""What the author of a method must know, each module above those that it may import."""

BELOW: dict[str, tuple[str, ...]] = {
    "data": (),
    "models": ("data",),
    "federation": ("data", "models"),
    "methods": ("data", "models", "federation"),
    "run": ("data", "models", "federation"),
    "analysis": ("run",),
    "study": ("data", "models", "run", "analysis"),
    "audit": ("data", "models", "federation", "run", "analysis"),
    "deployment": ("data", "models", "federation", "run"),
}
"""The folders that each folder may import from, besides itself and the spine."""

BY_NAME = ("fedlscl", "fedlscl.methods", "fedlscl.run.names")
"""They import by name: the class that a user or a configuration names."""

REPORTING = ("fedlscl.analysis.", "fedlscl.study.")
"""They tell runs apart by the names in their summaries or configurations, and nothing that trains may know them."""


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


@cache
def imported(module: str) -> tuple[str, ...]:
    """Every module of the package that `module` imports anywhere in its text, inside functions too."""
    return tuple(_imported(module))


def _imported(module: str) -> Iterator[str]:
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and called(node).endswith("import_module") and module not in BY_NAME:
            raise AssertionError(f"{module} imports by name, which nothing can check")
        else:
            continue
        yield from (name for name in names if name in FILES and name != "fedlscl")


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


@cache
def reached(module: str) -> set[str]:
    """All that comes along when `module` is imported."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        for name in imported(waiting.pop()):
            if name not in found:
                found.add(name)
                waiting.append(name)
    return found


def folder(module: str) -> str:
    """The folder of a module, or what it is itself in the spine: fedlscl.methods.fed_lscl is in methods."""
    return module.split(".")[1] if "." in module else ""


def test_the_source_is_where_it_is_looked_for() -> None:
    assert {f"fedlscl.{name}" for name in (*SPINE, *BELOW)} <= set(FILES)
    assert {folder(name) for name in FILES} == {*SPINE, *BELOW, "", "cli"}
    assert set(imported("fedlscl.federation.algorithm")) >= {"fedlscl.server", "fedlscl.messages"}
    assert "fedlscl.client" in reached("fedlscl.methods.fed_lscl")


@pytest.mark.parametrize("module", sorted(FILES))
def test_arrows_between_folders_go_downwards(module: str) -> None:
    own = folder(module)
    if own in BELOW:
        found = {folder(name) for name in imported(module)} - {own, *SPINE}
        assert found <= set(BELOW[own])


@pytest.mark.parametrize("module", SPINE)
def test_the_spine_knows_data_and_models_alone(module: str) -> None:
    found = {folder(name) for name in reached(f"fedlscl.{module}")}
    assert found <= {*SPINE, "data", "models"}
    if module in ("client", "server"):
        assert {"client", "server"}.isdisjoint(found)


@pytest.mark.parametrize("module", sorted(FILES))
def test_flower_is_known_to_its_adapter_alone(module: str) -> None:
    if not module.startswith("fedlscl.deployment.flower"):
        assert not [name for name in imported(module) if name.startswith("fedlscl.deployment.flower")]
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert "flwr" not in {name.split(".")[0] for name in names}, f"line {node.lineno}"


@pytest.mark.parametrize("module", sorted(FILES))
def test_there_is_no_circle(module: str) -> None:
    assert module not in reached(module)


# ------------------------------------------------------------ nobody asks for a method


@cache
def method_names() -> set[str]:
    """What a method could be told by: its file or folder, its classes, the name of its configuration."""
    methods = [name for name in FILES if name.startswith("fedlscl.methods.")]
    classes = {node.name for name in methods for node in ast.walk(tree(name)) if isinstance(node, ast.ClassDef)}
    configurations = {path.stem for path in (ROOT.parent / "experiments" / "methods").glob("*_*.yaml")}
    return classes | configurations | {name.split(".")[2] for name in methods}


def test_the_names_of_the_methods_are_known_here() -> None:
    assert {"FedLSCL", "fed_lscl", "frozen_vit", "small_model", "glfc", "GLFCServer"} <= method_names()


def compared(module: str) -> Iterator[ast.expr]:
    """Both sides of every comparison, and the patterns of every match."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Compare):
            yield from (node.left, *node.comparators)
        elif isinstance(node, ast.Match):
            yield node.subject
            yield from (p.value for case in node.cases for p in ast.walk(case) if isinstance(p, ast.MatchValue))
        elif isinstance(node, ast.Call) and called(node) in ("isinstance", "issubclass", "getattr", "hasattr"):
            yield from node.args


@pytest.mark.parametrize("module", sorted(FILES))
def test_no_module_asks_which_method_it_is(module: str) -> None:
    if module.startswith(REPORTING):
        return
    names = method_names()
    for side in compared(module):
        for part in ast.walk(side):
            asked = {
                ast.Name: lambda p: p.id in ("method", "method_name"),
                ast.Attribute: lambda p: p.attr in ("method", "method_name", "__name__", "__qualname__"),
                ast.Constant: lambda p: p.value in names,
            }.get(type(part))
            assert not (asked and asked(part)), f"line {side.lineno}: {ast.unparse(side)}"
    if not module.startswith("fedlscl.methods"):
        used = {node.id for node in ast.walk(tree(module)) if isinstance(node, ast.Name)}
        assert not used & {name for name in names if name[0].isupper()}


# ----------------------------------------------------------------- nothing is unpickled


@pytest.mark.parametrize("module", sorted(FILES))
def test_nothing_is_unpickled_or_run_from_text(module: str) -> None:
    forbidden = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {name.split(".")[0] for name in names} & forbidden, f"line {node.lineno}"
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            assert not {alias.name for alias in node.names} & {"load", "save"}, f"line {node.lineno}"
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("torch.load", "torch.save", "torch.hub.load"), f"line {node.lineno}"
        if isinstance(node, ast.Call):
            name = called(node)
            assert name not in ("eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load"), name
            pickles = [k for k in node.keywords if k.arg == "allow_pickle" and ast.unparse(k.value) != "False"]
            assert not pickles, f"line {node.lineno}"


@pytest.mark.parametrize("module", sorted(FILES))
def test_no_module_seeds_or_draws_from_numpys_or_pythons_global_state(module: str) -> None:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("np.random", "numpy.random"):
            assert node.attr in ("default_rng", "SeedSequence", "Generator"), f"line {node.lineno}"
        if isinstance(node, ast.Import):
            assert "random" not in {alias.name for alias in node.names}, f"line {node.lineno}"
