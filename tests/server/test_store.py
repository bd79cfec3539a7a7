"""The store after the power has failed: nothing is named before it is on the disk. What a kill leaves is the walk's."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from server.store import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the system was told, in order: of which file or folder, as its name then was."""
    calls: list[str] = []
    fsync, rename, replace, link = os.fsync, os.rename, os.replace, os.link

    def name(path: str | Path) -> str:
        parts = Path(path).relative_to(tmp_path).parts
        return str(Path(*("new" if part.endswith(".tmp") else part for part in parts)))

    def recorded(verb: str, move: Callable[..., None]) -> Callable[..., None]:
        def do(source: Path, target: Path, **options: int) -> None:
            calls.append(f"{verb} {name(source)} {name(target)}")
            move(source, target, **options)

        return do

    def synced(descriptor: int) -> None:
        calls.append(f"fsync {name(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", recorded("rename", rename))
    monkeypatch.setattr(os, "replace", recorded("replace", replace))
    monkeypatch.setattr(os, "link", recorded("link", link))
    return calls


def test_a_folder_gets_its_name_when_it_and_its_files_are_on_the_disk(store: LocalStore, told: list[str]) -> None:
    def write(folder: Path) -> None:
        for name in ("one", "two"):
            (folder / name).write_text(name)

    store.put("a/b/key", write)
    folders, (*files, folder), renamed = told[:2], told[2:5], told[5:]
    assert folders == ["fsync .", "fsync a"], "the folders above are made, each known to the one above it"
    assert sorted(files) == ["fsync a/b/new/one", "fsync a/b/new/two"]
    assert folder == "fsync a/b/new"
    assert renamed == ["rename a/b/new a/b/key", "fsync a/b"]


def test_a_file_gets_its_name_when_it_is_on_the_disk(store: LocalStore, told: list[str], tmp_path: Path) -> None:
    (tmp_path / "written").write_text("text")
    store.publish_file(tmp_path / "written", "name")
    assert told == ["fsync written", "replace written name", "fsync ."]
    told.clear()
    store.publish_new_file(store.path("name"), "another")
    assert told == ["fsync name", "link name another", "fsync ."]
