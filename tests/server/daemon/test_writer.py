"""Files written beside the training: in order, whole, and what follows them in the loop's own thread."""

import errno
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from server.daemon.writer import Writer
from server.store import LocalStore, Manifest, manifest


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def writer(store: LocalStore) -> Writer:
    return Writer(store)


def file_of(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "file").write_text(text)


def test_a_folder_is_whole_when_what_follows_runs_and_its_hashes_are_told(writer: Writer, store: LocalStore) -> None:
    told: list[Manifest] = []
    writer.put("a/b", file_of("text"), told.append)
    writer.wait()
    file = {"sha256": hashlib.sha256(b"text").hexdigest(), "bytes": 4}
    assert told == [{"file": file}] == [manifest(store.path("a/b"))]
    assert not list(store.path("a").glob("*.tmp"))


def test_everything_happens_in_the_order_in_which_it_was_asked(writer: Writer, store: LocalStore) -> None:
    order: list[str] = []
    gate = threading.Event()
    writer.put("x/1", lambda folder: gate.wait(30), lambda files: order.append("1"))
    writer.put("x/2", file_of("2"), lambda files: order.append("2"))
    writer.delete("x")
    writer.after(lambda: order.append("after"))
    writer.settle()
    assert (order, writer.is_idle) == ([], False)
    gate.set()
    writer.wait()
    assert order == ["1", "2", "after"]
    assert writer.is_idle
    assert not store.path("x").exists()


def test_with_nothing_under_way_what_follows_runs_at_once(writer: Writer) -> None:
    ran: list[int] = []
    writer.after(lambda: ran.append(1))
    assert ran == [1]


def test_what_follows_may_ask_for_more(writer: Writer, store: LocalStore) -> None:
    writer.put("a/1", file_of("1"), lambda files: writer.put("a/2", file_of("2"), lambda files: writer.delete("a/1")))
    writer.wait()
    assert store.list("a") == ["a/2"]


def test_what_follows_runs_in_the_thread_that_settles(writer: Writer) -> None:
    threads: list[threading.Thread] = []
    writer.put("a/1", file_of("1"), lambda files: threads.append(threading.current_thread()))
    writer.wait()
    assert threads == [threading.current_thread()]


def test_an_error_that_no_other_try_cures_is_raised_and_leaves_nothing(writer: Writer, store: LocalStore) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise ValueError("a mistake of ours")

    writer.put("a/1", fail, lambda files: None)
    with pytest.raises(ValueError, match="a mistake of ours"):
        writer.wait()
    assert not list(store.path("a").iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_what_the_disk_does_not_take_is_written_again_into_new_files_until_it_does(
    number: int, writer: Writer, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second fsync of a file would succeed and say nothing of the pages that the first one lost."""
    failures = iter([True, False, False, True])  # of the first two tries: a file, and the folder above
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if next(failures, False):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    store.path("a").mkdir(parents=True)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr("server.daemon.writer.RETRY_SECONDS", 0.01)
    told: list[object] = []
    folders: list[str] = []

    def write(folder: Path) -> None:
        folders.append(folder.name)
        (folder / "file").write_text("1")

    writer.put("a/1", write, lambda files: told.append("then"), lambda error: told.append(error.errno))
    writer.wait()
    assert told == [number, "then"]
    assert writer.trouble is None
    assert store.list("a") == ["a/1"]
    assert len(list(store.path("a").iterdir())) == 1
    assert len(set(folders)) == 3


def test_while_the_disk_takes_nothing_erasing_goes_on_and_may_be_what_makes_room(
    writer: Writer, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.daemon.writer.RETRY_SECONDS", 0.01)
    writer.put("a/old", file_of("old"), lambda files: None)
    writer.wait()

    def write(folder: Path) -> None:
        if store.path("a/old").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        (folder / "file").write_text("new")

    writer.put("a/new", write, lambda files: None)
    writer.delete("a/old")
    writer.wait()
    assert store.list("a") == ["a/new"]


def test_a_life_that_ends_gives_up_what_the_disk_has_not_taken(writer: Writer) -> None:
    def write(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer.put("a/1", write, lambda files: None)
    writer.close()
