"""Where the login comes from."""

from pathlib import Path

import pytest

from mixloom.stored import current_login, last_job, remember_last_job, save_login


def test_the_login_is_readable_by_its_owner_alone() -> None:
    path = save_login("http://one:8000/", "a key")
    assert path.stat().st_mode & 0o777 == 0o600
    assert (current_login().url, current_login().api_key) == ("http://one:8000", "a key")


def test_the_environment_wins_over_the_stored_login(monkeypatch: pytest.MonkeyPatch) -> None:
    save_login("http://one:8000", "a key")
    monkeypatch.setenv("MIXLOOM_API_KEY", "another key")
    assert (current_login().url, current_login().api_key) == ("http://one:8000", "another key")


def test_a_stored_key_never_goes_to_another_server(monkeypatch: pytest.MonkeyPatch) -> None:
    save_login("http://one:8000", "a key")
    assert current_login("http://two:8000").api_key is None
    monkeypatch.setenv("MIXLOOM_URL", "http://two:8000")
    assert current_login().api_key is None
    assert current_login("http://one:8000/").api_key == "a key"


def test_without_a_login_the_server_is_this_machine(own_home: Path) -> None:
    assert (current_login().url, current_login().api_key) == ("http://127.0.0.1:8000", None)


def test_each_server_has_a_last_job_of_its_own() -> None:
    remember_last_job("http://one", "job_1")
    remember_last_job("http://two", "job_2")
    assert (last_job("http://one"), last_job("http://two"), last_job("http://three")) == (
        "job_1",
        "job_2",
        None,
    )
