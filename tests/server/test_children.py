"""What processes of ours begin with."""

import pytest

from server.children import WAITING, environment_of_daemon


def test_an_operators_way_of_waiting_is_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WAITING:
        monkeypatch.delenv(name, raising=False)
    assert environment_of_daemon().items() >= WAITING.items()
    for name, other in (tuple(WAITING), tuple(WAITING)[::-1]):
        with monkeypatch.context() as patch:
            patch.setenv(name, "of the operator")
            environment = environment_of_daemon()
        assert (environment[name], other in environment) == ("of the operator", False)


def test_a_setting_of_the_operator_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    assert environment_of_daemon()["MALLOC_ARENA_MAX"] == "4"
