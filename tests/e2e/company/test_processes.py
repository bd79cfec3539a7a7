"""How the server's two processes share a machine."""

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from tests.e2e.server import Server

pytestmark = pytest.mark.databases("sqlite")


def niceness_of_threads(pid: int) -> set[int]:
    return {os.getpriority(os.PRIO_PROCESS, thread.id) for thread in psutil.Process(pid).threads()}


def test_every_thread_of_the_daemon_gives_way_to_the_api(server: Server) -> None:
    assert server.process is not None
    assert server.daemon_pid is not None
    assert min(niceness_of_threads(server.daemon_pid)) > max(niceness_of_threads(server.process.pid))


def test_so_does_its_session_where_linux_weighs_sessions(server: Server) -> None:
    assert server.daemon_pid is not None
    autogroup = Path(f"/proc/{server.daemon_pid}/autogroup")
    if not autogroup.exists():
        pytest.skip("a kernel without autogroups")
    assert int(autogroup.read_text().split()[-1]) == max(niceness_of_threads(server.daemon_pid))


def test_the_head_of_a_request_cannot_go_on_until_memory_ends(server: Server) -> None:
    url = urlsplit(server.url)
    assert url.hostname is not None
    assert url.port is not None
    with socket.create_connection((url.hostname, url.port), timeout=30) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: here\r\n" + b"X-Long: " + bytes([120]) * 2**17)
        assert connection.recv(1024).startswith(b"HTTP/1.1 400 ")
