"""Starts that cannot succeed say why in one sentence, promptly, and start nothing by halves."""

import socket
import time
from pathlib import Path

from tests.e2e.conftest import NewServer
from tests.e2e.server import Server, is_gone, wait_for


def ends(server: Server, *, seconds: float) -> str:
    """Start a server that is to end by itself within so many seconds, with a code that is not 0; its words."""
    began = time.monotonic()
    process = server.spawn()
    wait_for(lambda: server.daemon_pid or process.poll() is not None)
    daemon = server.daemon_pid
    code = process.wait(60)
    assert time.monotonic() - began < seconds
    assert code not in (0, None)
    assert daemon is None or is_gone(daemon)
    assert "Traceback" not in server.log
    return server.log


def test_a_port_in_use_is_named_and_no_daemon_is_started(new_server: NewServer) -> None:
    server = new_server()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", server.port))
        other.listen()
        said = ends(server, seconds=15)
    assert f"127.0.0.1:{server.port}" in said
    assert "--port" in said
    assert not (server.data / "daemon.lock").exists()


def test_a_data_directory_that_cannot_be_written_is_named(new_server: NewServer) -> None:
    server = new_server()
    server.folder.mkdir(parents=True)
    server.data.write_text("a file in the way")
    said = ends(server, seconds=15)
    assert f"The data directory {server.data} cannot be written" in said


def test_a_chat_template_that_is_not_there_is_named(new_server: NewServer, tmp_path: Path) -> None:
    assert "chat_template" in ends(new_server(chat_template=tmp_path / "none.jinja"), seconds=15)


def test_a_base_that_cannot_be_loaded_ends_the_server(new_server: NewServer, tmp_path: Path) -> None:
    """Which ones these are: tests/server/daemon/test_main.py."""
    said = ends(new_server(base=tmp_path / "no-such-folder"), seconds=60)
    assert str(tmp_path / "no-such-folder") in said
    assert "base_not_loaded" in said
