"""The doors of the house: which folder may import what. A new door fails here first."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOUSE = frozenset({"engine", "scheduler", "server", "mixloom", "migrations", "benchmarks", "tests"})
HEAVY = frozenset({"torch", "transformers", "datasets"})
DATA = frozenset({"datasets", "pandas", "scipy", "sklearn"})
"""What libraries bring along where they are looked into too soon."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """A folder, and the packages that it may import besides itself and the standard library."""

    folder: str
    ours: frozenset[str] = frozenset()
    others: frozenset[str] | None = None  # None: any but `never`
    never: frozenset[str] = frozenset()
    without: frozenset[str] = frozenset()  # files that have rules of their own


ROOMS = [
    Room(folder="scheduler", others=frozenset()),
    Room(
        folder="engine",
        others=frozenset(
            {
                "torch",
                "transformers",
                "tokenizers",
                "safetensors",
                "numpy",
                "gguf",
                "huggingface_hub",
                "platformdirs",
                "numba",
            }
        ),
    ),
    Room(folder="mixloom", others=frozenset({"httpx", "typer", "rich", "yaml", "platformdirs"})),
    Room(
        folder="server",
        ours=frozenset({"migrations"}),
        never=HEAVY,
        without=frozenset({"server/daemon", "server/__main__.py", "server/hub.py"}),
    ),
    Room(folder="server/__main__.py", ours=frozenset({"server.daemon"}), never=HEAVY),
    Room(folder="server/hub.py", never=HEAVY - {"datasets"}),
    Room(folder="server/daemon", ours=frozenset({"server", "engine", "scheduler"}), never=frozenset({"fastapi"})),
    Room(folder="migrations", ours=frozenset({"server"}), never=HEAVY),
]


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, at the top or inside a function; `from a import b` is a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}:
            name = node.args[0] if node.args else None
            yield node.lineno, name.value if isinstance(name, ast.Constant) else f"?{ast.unparse(node)}"


def is_allowed(module: str, room: Room) -> bool:
    """Imports are absolute and by a name that can be read."""
    package = module.split(".")[0]
    if not package.isidentifier():
        return False
    if package in sys.stdlib_module_names:
        return True
    if package in HOUSE:
        is_daemon = module == "server.daemon" or module.startswith("server.daemon.")
        if is_daemon and room.folder != "server/daemon":
            return "server.daemon" in room.ours
        return package == room.folder.split("/")[0] or package in room.ours
    return package not in room.never if room.others is None else package in room.others


def doors(room: Room, root: Path) -> list[str]:
    """Every import that the room may not have, as `file:line module`."""
    start = root / room.folder
    found = []
    for file in [start] if start.is_file() else sorted(start.rglob("*.py")):
        name = file.relative_to(root).as_posix()
        if any(name == other or name.startswith(f"{other}/") for other in room.without):
            continue
        lines = imports(file.read_text(encoding="utf-8"))
        found += [f"{name}:{line} {module}" for line, module in lines if not is_allowed(module, room)]
    return found


def modules_after(*modules: str) -> list[set[str]]:
    """What is loaded in a fresh interpreter after each of these imports, one after another.

    Top-level packages, and our modules by full name.
    """
    lines = [f"import {module}\nprint(*sys.modules)" for module in modules]
    printed = subprocess.run(
        [sys.executable, "-c", "\n".join(["import gc, sys", "gc.disable()", *lines])],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [
        {name for name in line.split() if "." not in name or name.split(".")[0] in HOUSE}
        for line in printed.splitlines()
    ]


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.folder)
def test_no_folder_imports_what_it_must_not_know(room: Room):
    assert (ROOT / room.folder).exists()
    assert doors(room, ROOT) == []


def test_the_api_process_asks_for_the_daemon_only_when_it_becomes_one():
    """`server/__main__.py` runs both: it imports the daemon inside a function, and at no other place."""
    tree = ast.parse((ROOT / "server/__main__.py").read_text(encoding="utf-8"))
    at_the_top = ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef)], [])
    assert not [name for _, name in imports(ast.unparse(at_the_top)) if name.startswith("server.daemon")]


@pytest.mark.parametrize(
    "line",
    [
        "import torch",
        "import torch.nn as nn",
        "from transformers import AutoModel",
        "def late():\n    import datasets",
        "if True:\n    from engine.run import Run",
        "from scheduler import plan",
        "from server import daemon",
        "from server.daemon.loop import Loop",
        "import importlib\nimportlib.import_module('torch')",
        "import importlib\nimportlib.import_module('to' + 'rch')",
        "from . import daemon",
        "from mixloom import Client",
    ],
)
def test_a_new_door_of_the_api_is_seen(line: str, tmp_path: Path):
    (tmp_path / "server" / "api").mkdir(parents=True)
    (tmp_path / "server" / "api" / "jobs.py").write_text(line)
    room = next(room for room in ROOMS if room.folder == "server")
    assert doors(room, tmp_path) != []


@pytest.mark.parametrize(
    ("process", "never"),
    [
        ("mixloom.cli.main", {*HEAVY, *DATA, "fastapi", "sqlalchemy", "numpy", "server", "engine", "scheduler"}),
        ("server.serve", {*HEAVY, *DATA, "engine", "scheduler", "server.daemon"}),
    ],
    ids=["the command", "the API and the supervisor"],
)
def test_a_process_loads_at_its_start_what_it_needs_and_no_more(process: str, never: set[str]):
    (loaded,) = modules_after(process)
    assert process in loaded
    assert loaded.isdisjoint(never)


def test_so_does_the_daemon_whose_engine_and_scheduler_load_nothing_of_the_server():
    _, parts, daemon = modules_after("engine.engine", "scheduler.plan", "server.daemon.main")
    assert {"engine.engine", "scheduler.plan"} <= parts
    assert parts.isdisjoint({"server", "fastapi", "sqlalchemy", "mixloom"})
    assert "server.daemon.main" in daemon
    assert daemon.isdisjoint({*DATA, "fastapi", "uvicorn", "pyarrow", "peft", "server.api"})


def test_no_module_that_the_api_process_may_load_brings_torch():
    """Also those that only a request imports."""
    names = [
        file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        for file in sorted((ROOT / "server").rglob("*.py"))
        if "daemon" not in file.relative_to(ROOT).parts and file.name != "__main__.py"
    ]
    *_, loaded = modules_after(*names)
    assert set(names) <= loaded
    assert loaded.isdisjoint({*HEAVY, "engine", "scheduler", "server.daemon"})
