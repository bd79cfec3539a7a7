"""Starts that cannot succeed say why in one sentence, promptly, and start nothing by halves."""

import socket
import subprocess
import time
from pathlib import Path

import pytest

from mixloom import Client
from server.db.stores import MARK
from tests.e2e.conftest import NewServer
from tests.e2e.server import START_SECONDS, Server, is_gone, wait_for
from tests.postgresql import PostgreSQL


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


def start_at_once(*servers: Server) -> "list[subprocess.Popen[bytes]]":
    """In one new folder, where the first of them is to write the operator's key."""
    assert not servers[0].data.exists()
    for server in servers:
        del server.environment["MIXLOOM_ADMIN_KEY"]
    return [server.spawn() for server in servers]


def the_operator(server: Server) -> Client:
    """With the key that was written, of which one has told."""
    wait_for(lambda: f"Mixloom listens on {server.url}" in server.log, why=lambda: server.log)
    assert server.log.count("The operator's key is in") == 1
    return Client(server.url, (server.data / "admin.key").read_text().strip())


def test_of_two_servers_that_start_at_once_on_one_port_one_serves_and_the_other_says_why_not(
    new_server: NewServer,
) -> None:
    server, other = new_server(), new_server()
    other.port = server.port
    processes = start_at_once(server, other)
    wait_for(lambda: any(process.poll() is not None for process in processes))
    assert sorted(process.poll() is None for process in processes) == [False, True]
    assert [process.returncode for process in processes if process.poll() is not None] == [1]
    assert f"Cannot listen on 127.0.0.1:{server.port}" in server.log
    assert the_operator(server).admin.queue() == []
    assert "Traceback" not in server.log


@pytest.mark.slow
def test_of_two_servers_that_start_at_once_on_ports_of_their_own_both_answer_with_one_key_and_one_daemon_trains(
    new_server: NewServer,
) -> None:
    server, other = new_server(), new_server()
    start_at_once(server, other)
    operators = [the_operator(server), the_operator(other)]
    wait_for(lambda: "waiting_for_lock" in server.log, START_SECONDS)
    wait_for(lambda: "ready" in {one["state"] for one in operators[0].admin.daemons()}, START_SECONDS)
    assert [len(operator.admin.daemons()) for operator in operators] == [1, 1]
    assert [server.stop(), other.stop()] == [0, 0]
    assert "Traceback" not in server.log


@pytest.mark.slow
def test_of_two_servers_that_start_at_once_on_one_database_with_two_data_directories_one_serves(
    new_server: NewServer, postgresql: PostgreSQL
) -> None:
    """Each would fail the jobs of the other, whose files it does not have."""
    url = postgresql.new_database()
    servers = [new_server(name=name, database_url=url) for name in ("one", "other")]
    processes = [server.spawn() for server in servers]
    wait_for(lambda: any(process.poll() is not None for process in processes))
    (refused,) = (n for n, process in enumerate(processes) if process.poll() is not None)
    serving = servers[1 - refused]
    assert processes[refused].returncode == 1
    assert f"in another data directory than {servers[refused].data}" in servers[refused].log
    assert (serving.data / MARK).read_text().strip() in servers[refused].log
    wait_for(lambda: "Mixloom listens on" in serving.log, why=lambda: serving.log)
    assert serving.admin.admin.queue() == []
    assert "Traceback" not in servers[0].log + servers[1].log


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
