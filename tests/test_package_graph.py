"""Imports between packages, held to the floors that docs/architecture.md states."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {"dash_dist": ROOT / "dash_dist", "dash_kernels": ROOT / "kernels" / "dash_kernels"}


def modules() -> dict[str, Path]:
    """Every module by its dotted name; a package by that of its folder."""
    found = {}
    for package, folder in SOURCES.items():
        for path in folder.rglob("*.py"):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def floors() -> dict[str, int]:
    """Floor of each package: the numbered list of the section "Floors"."""
    section = (ROOT / "docs" / "architecture.md").read_text().split("## Floors")[1].split("\n| ")[0]
    lines = re.findall(r"^(\d+)\. (.*)$", section, re.MULTILINE)
    return {name: int(number) for number, names in lines for name in re.findall(r"`(\w+)`", names)}


def package_of(module: str) -> str:
    top, *rest = module.split(".")
    return rest[0] if top == "dash_dist" and rest else top


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of this project that a file imports when it runs, those inside functions included."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from (names & known.keys()) or ({node.module} & known.keys())
        elif isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & known.keys()


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imported(path, known)) for name, path in known.items()}


def test_every_import_points_to_a_lower_floor(graph):
    floor = floors()
    # The package's own __init__ only re-exports names, on first use.
    edges = {(package_of(a), package_of(b)) for a, targets in graph.items() for b in targets if a != "dash_dist"}
    edges = {(a, b) for a, b in edges if a != b and b != "dash_dist"}
    assert len(edges) > 30
    assert {name for edge in edges for name in edge} <= floor.keys()
    assert [(a, b) for a, b in sorted(edges) if floor[a] <= floor[b]] == []


def test_no_module_imports_itself_in_a_circle(graph):
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in graph[module]:
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())
