"""What this version reads of what it, or one before it, has written to a disk. How it was made: `tests.golden.make`."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine import recovery
from engine.engine import Engine
from server.daemon.program import Cursor
from server.store import is_whole, manifest
from tests.engine.others import publish
from tests.golden.make import FOLDER, RUNS, adapter_of, state_of
from tests.models import tiny_base

PLACES = sorted(path.parent for path in FOLDER.glob("schema-*/*/known.json"))
OF_THIS_VERSION = [FOLDER / f"schema-{recovery.SCHEMA}" / name for name in RUNS]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_base())


def known_of(place: Path) -> dict[str, Any]:
    known: dict[str, Any] = json.loads((place / "known.json").read_text())
    return known


def name_of(place: Path) -> str:
    return str(place.relative_to(FOLDER))


@pytest.mark.parametrize("place", PLACES, ids=name_of)
def test_a_recovery_point_of_this_schema_and_those_before_is_the_run_that_was_saved(
    place: Path, engine: Engine
) -> None:
    known = known_of(place)
    assert is_whole(place / "point", known["point"])
    run = engine.load(place / "point")
    assert state_of(run) == known["state"]
    assert Cursor(**known["cursor"]).step == run.step


@pytest.mark.parametrize("place", PLACES, ids=name_of)
def test_an_adapter_of_this_version_and_those_before_has_the_weights_that_were_published(
    place: Path, engine: Engine
) -> None:
    known = known_of(place)
    assert is_whole(place / "adapter", known["adapter"])
    kept = {name: known["state"][name] for name in ("config", "weights")}
    assert adapter_of(engine.load_adapter(place / "adapter")) == kept


@pytest.mark.parametrize("place", OF_THIS_VERSION, ids=name_of)
def test_the_formats_are_what_their_schema_says(place: Path, engine: Engine, tmp_path: Path) -> None:
    """Other bytes for the same run are another schema: see `engine.recovery`."""
    run = engine.load(place / "point")
    (tmp_path / "point").mkdir()
    engine.save(run, tmp_path / "point")
    publish(engine, run, tmp_path / "adapter")
    known = known_of(place)
    assert manifest(tmp_path / "point") == known["point"]
    assert manifest(tmp_path / "adapter") == known["adapter"]
