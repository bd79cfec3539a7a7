"""What an operator sets, and what is shown of it."""

import pytest

from server.__main__ import main


def test_the_databases_password_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--database-url", "postgresql://someone:secret@host:5433/tables"]) == 0
    shown = capsys.readouterr().out
    assert "database_url = postgresql://someone:***@host:5433/tables  (flag)" in shown
    assert "secret" not in shown


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///tables.db",
        "mysql://me:secret@host/tables",
        "me:secret@host",
        "postgresql://me:secret@host:port/x",
        "",
    ],
)
def test_a_database_that_is_none_of_the_two_kinds_is_refused(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--database-url", url]) == 2
    said = capsys.readouterr().err
    assert said.startswith("mixloom: database_url: it must be like postgresql://USER@HOST/NAME")
    assert "secret" not in said
