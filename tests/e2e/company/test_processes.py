"""How the server's two processes share a machine."""

import os
from pathlib import Path

import psutil
import pytest

from tests.e2e.server import Server


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
