"""How fast the daemon says that gangs go."""

import pytest

from server.daemon.pace import MEMORY_SECONDS, Pace
from tests.server.conftest import Caller
from tests.server.daemon.conftest import PLAIN, Life, submit


def test_what_lies_between_two_gangs_counts_and_a_rest_does_not() -> None:
    pace = Pace()
    assert (pace.tokens_per_second, pace.gang_seconds) == (0.0, 0.0)
    pace.add(100, began=0.0, ended=1.0)
    assert pace.tokens_per_second == 100.0
    pace.add(100, began=1.5, ended=2.0)
    assert pace.tokens_per_second == pytest.approx(100.0)
    pace.rest()
    pace.add(100, began=9.0, ended=10.0)
    assert pace.tokens_per_second == pytest.approx(100.0)
    assert pace.gang_seconds == pytest.approx(1.0)


def test_a_gang_counts_by_its_time_and_less_as_time_goes_by() -> None:
    pace = Pace()
    pace.add(1000, began=0.0, ended=1.0)
    pace.add(10, began=1.0, ended=1.1)  # a small gang, slower a token, changes little
    assert pace.tokens_per_second == pytest.approx(1010 / 1.1, rel=0.01)
    for second in range(int(5 * MEMORY_SECONDS)):
        pace.add(50, began=2.0 + second, ended=3.0 + second)
    assert pace.tokens_per_second == pytest.approx(50.0, rel=0.02)


def test_a_turn_without_a_gang_is_a_rest(life: Life, alice: Caller) -> None:
    submit(alice, PLAIN, steps=2)
    life.finish()
    slow = life.loop.pace.gang_seconds
    life.loop.pace.add(100, began=1e9, ended=1e9)  # long after
    assert 0 < life.loop.pace.gang_seconds < slow
