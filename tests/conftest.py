"""What a run leaves out for being slow or needing a GPU is said by name, before pytest's closing line.

And the order of files, and the one PostgreSQL of a run.
"""

import re
from collections import Counter
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from server import garbage
from tests import postgresql as package
from tests.postgresql import PostgreSQL

LEFT_OUT = pytest.StashKey[set[str]]()
"""Ids of tests, each with its reasons."""
REASONS = ("slow", "cuda")
OF_ONE_SERVER = ("tests/e2e/interrupted/", "tests/e2e/company/")
"""Folders whose files share a server, and so stay in one process of a run as the tests of a file do."""
LONGEST = (
    "tests/e2e/interrupted/",
    "tests/e2e/test_drain.py",
    "tests/e2e/",
    "tests/test_wheel.py",
    "tests/test_readme.py",
    "tests/benchmarks/",
    "tests/engine/",
)
"""What takes longest comes first, so that no process of a run has much left when the other is done."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = set()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Every library and test is imported here."""
    with garbage.loading():
        return (yield)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Who runs what in a run of several processes."""
    from xdist.scheduler import LoadFileScheduling

    class ByServer(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((folder for folder in OF_ONE_SERVER if nodeid.startswith(folder)), super()._split_scope(nodeid))

    return ByServer(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: [item.nodeid.startswith(name) for name in LONGEST], reverse=True)


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        reasons = [reason for reason in REASONS if item.get_closest_marker(reason)]
        if reasons:
            item.config.stash[LEFT_OUT].add(f"{item.nodeid}  ({', '.join(reasons)})")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of several processes: it tells the one that reports
        session.config.workeroutput["left_out"] = sorted(session.config.stash[LEFT_OUT])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[LEFT_OUT].update(getattr(node, "workeroutput", {}).get("left_out", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[LEFT_OUT] and config.getoption("markexpr"):
        terminalreporter.section("left out: `make test-full` runs what is slow, and cuda where there is an NVIDIA GPU")
        tests = Counter(re.sub(r"\[.*\]", "", name) for name in config.stash[LEFT_OUT])
        for name, num_cases in sorted(tests.items()):
            terminalreporter.line(name if num_cases == 1 else f"{name}  {num_cases} cases")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """A server that tests share: each asks it for a database of its own."""
    if package.MISSING:
        pytest.skip(package.MISSING)
    server = PostgreSQL()
    yield server
    server.end()
