"""The pages tell the truth: generated parts are current, and links lead somewhere."""

import ast
import re
from pathlib import Path
from typing import get_args

import pytest

from docs.reference import FOLDER, PAGES, page
from server import doctor

ROOT = FOLDER.parent
WRITTEN = sorted([*ROOT.glob("*.md"), *FOLDER.glob("*.md")])


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_what_the_code_says(name: str) -> None:
    assert (FOLDER / name).read_text(encoding="utf-8") == page(name), "run `make docs`"


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_every_relative_link_leads_to_a_file(path: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert missing == []


def test_every_test_that_a_page_names_is_there() -> None:
    named = {name for path in WRITTEN for name in re.findall(r"`(test_\w+)`", path.read_text(encoding="utf-8"))}
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert sorted(name for name in named if f"def {name}(" not in tests) == []


def test_the_operator_s_page_names_everything_that_the_doctor_finds() -> None:
    text = (FOLDER / "operations.md").read_text(encoding="utf-8")
    assert [kind for kind in get_args(doctor.Kind) if f"`{kind}`" not in text] == []


def test_the_tests_that_ci_leaves_out_for_being_slow_are_marked_in_the_table_of_faults() -> None:
    page = (FOLDER / "reliability.md").read_text(encoding="utf-8")
    rows = "\n".join(line for line in page.splitlines() if re.match(r"\| \d+ \|", line))
    named = re.findall(r"`(test_\w+)`( \(slow\))?", rows)
    slow = slow_tests()
    assert {name for name, mark in named if mark} == {name for name, _ in named if name in slow}
    assert len({(name, mark) for name, mark in named}) == len({name for name, _ in named}), (
        "a test of several rows is marked in each"
    )


def slow_tests() -> set[str]:
    """Names of tests that are slow in every case: by a mark of their own or of their file."""
    slow: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assigned = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign)]
        is_of_file = any(line.startswith("pytestmark =") and "mark.slow" in line for line in assigned)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (
                is_of_file or "pytest.mark.slow" in map(ast.unparse, node.decorator_list)
            ):
                slow.add(node.name)
    return slow
