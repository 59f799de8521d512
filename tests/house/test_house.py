"""What holds the house: one meaning a class name, the field's words, a line a folder, files of a size, a budget."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRODUCT = ("potluck", "shard", "transport", "planner", "devices")
ROOMS = (*PRODUCT, "bench")
BUDGET_LINES = 54_700  # Goes down; raised only with a decision record that says why (docs/decisions/0016).
BUDGET_FILES = 332
MOST_LINES = 450
TOPLEVEL = {"__init__", "__main__", "entry"}


def modules(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def defined(tree: ast.AST) -> Iterator[str]:
    """Names of classes, functions, and what they and the module assign: fields and constants."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        if isinstance(node, ast.ClassDef | ast.Module):
            for each in node.body:
                targets = each.targets if isinstance(each, ast.Assign) else [getattr(each, "target", None)]
                yield from (target.id for target in targets if isinstance(target, ast.Name))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def words() -> dict[str, str]:
    lines = (Path(__file__).parent / "words.txt").read_text().splitlines()
    return dict(line.split(maxsplit=1) for line in lines if line and not line.startswith("#"))


def test_a_class_name_means_one_thing() -> None:
    found = defaultdict(list)
    for path in modules(*PRODUCT):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found[node.name.lstrip("_")].append(name_of(path))
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}


def test_names_are_the_fields_own() -> None:
    old = words()
    found = []
    for path in modules(*ROOMS):
        names = {*defined(ast.parse(path.read_text())), path.stem, path.parent.name}
        for name in names:
            if new := old.get(name) or old.get(name.lstrip("_")):
                found.append(f"{name_of(path)}: {name} is called {new}")
    assert found == []


def test_every_folder_has_its_line_on_the_map() -> None:
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    folders = {path.parent.relative_to(ROOT) for path in modules(*ROOMS)}
    unnamed = [folder for folder in folders if f"{'/'.join(folder.parts[1:]) or folder}/" not in page]
    assert sorted(map(str, unnamed)) == []


def test_every_file_that_the_map_names_is_there() -> None:
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    names = set(re.findall(r"`([\w/]+\.py)`", page))
    files = [name_of(path) for path in modules(*ROOMS)]
    assert sorted(name for name in names if not any(f"/{file}".endswith(f"/{name}") for file in files)) == []


def test_architecture_is_one_page() -> None:
    assert len((ROOT / "docs" / "ARCHITECTURE.md").read_text().splitlines()) <= 120
    assert len((ROOT / "docs" / "GLOSSARY.md").read_text().splitlines()) <= 40


def test_nothing_lies_loose_in_the_product() -> None:
    assert {path.stem for path in (ROOT / "potluck").glob("*.py")} == TOPLEVEL


@pytest.mark.parametrize("room", [*ROOMS, "tests"])
def test_files_are_of_a_size_that_can_be_read(room: str) -> None:
    sizes = {name_of(path): len(path.read_text().splitlines()) for path in modules(room)}
    assert {name: lines for name, lines in sizes.items() if lines > MOST_LINES} == {}


def test_the_house_does_not_grow_unnoticed() -> None:
    files = modules(*ROOMS)
    assert sum(len(path.read_text().splitlines()) for path in files) <= BUDGET_LINES
    assert len(files) <= BUDGET_FILES


def test_no_test_imports_a_test_module() -> None:
    importing = re.compile(r"^\s*(?:from|import) tests\.(?:\w+\.)*test_\w+|^\s*from tests[\w.]* import .*\btest_", re.M)
    assert [name_of(path) for path in modules("tests") if importing.search(path.read_text())] == []


def test_test_helpers_are_in_support() -> None:
    """What tests share is in tests/support; beside tests there are only tests and what pytest itself finds."""
    loose = [
        name_of(path)
        for path in modules("tests")
        if path.relative_to(ROOT).parts[1] not in ("support", "fixtures")
        and not path.stem.startswith("test_")
        and path.stem not in ("__init__", "conftest")
    ]
    assert loose == []
