"""Files written beside the training: in order, whole, and what follows them in the loop's own thread."""

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from server.daemon.writer import Writer, manifest
from server.store import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def writer(store: LocalStore) -> Writer:
    return Writer(store)


def file_of(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "file").write_text(text)


def test_a_folder_is_whole_when_what_follows_runs_and_its_hashes_are_told(writer: Writer, store: LocalStore) -> None:
    told: list[dict[str, str]] = []
    writer.put("a/b", file_of("text"), told.append)
    writer.wait()
    assert told == [{"file": hashlib.sha256(b"text").hexdigest()}] == [manifest(store.path("a/b"))]
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


def test_a_write_that_fails_is_raised_and_leaves_nothing(writer: Writer, store: LocalStore) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError("the disk is full")

    writer.put("a/1", fail, lambda files: None)
    with pytest.raises(OSError, match="the disk is full"):
        writer.wait()
    assert store.list("a") == []
    assert not list(store.path("a").iterdir())
