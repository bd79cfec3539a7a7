"""When a loop counts as hung."""

import errno
from pathlib import Path

import pytest

from server.daemon.pulse import MULTIPLE, Pulse
from server.daemon.writer import Writer
from server.store import LocalStore


@pytest.fixture
def pulse() -> Pulse:
    return Pulse(hang_seconds=100)


def looks(pulse: Pulse, seconds: float, *, step: float = 2.0) -> list[bool]:
    """What a watcher sees who looks all the while."""
    return [pulse.is_hung(step) for _ in range(int(seconds / step))]


def test_nothing_is_hung_before_the_loop_begins(pulse: Pulse) -> None:
    assert not any(looks(pulse, 1000))


def test_a_loop_that_is_silent_for_too_long_is_hung(pulse: Pulse) -> None:
    pulse.beat()
    assert not any(looks(pulse, 100))
    assert all(looks(pulse, 10)[1:])


def test_a_loop_whose_passes_are_long_has_more_time(pulse: Pulse) -> None:
    pulse.beat()
    for _ in range(3):
        assert not any(looks(pulse, 90))
        pulse.beat()
    assert not any(looks(pulse, MULTIPLE * 80))
    assert any(looks(pulse, MULTIPLE * 20))


def test_who_waits_for_a_disk_that_takes_nothing_does_not_hang(
    pulse: Pulse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[bool] = []

    def write(_folder: Path) -> None:
        """Each time later than a loop may be silent, but for the last one."""
        tries.append(pulse.is_hung(90))
        if len(tries) < 5:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("server.daemon.writer.RETRY_SECONDS", 0.01)
    writer = Writer(LocalStore(tmp_path), pulse.beat)
    pulse.beat()
    writer.put("a/1", write, lambda files: None)
    writer.wait()
    assert tries == [False] * 5


def test_the_first_pass_may_take_as_long_as_the_probe_lets_expect(pulse: Pulse) -> None:
    pulse.expect(50)
    pulse.beat()
    assert not any(looks(pulse, MULTIPLE * 50))
