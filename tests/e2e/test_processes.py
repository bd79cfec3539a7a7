"""How the server's two processes share a machine."""

import os

import psutil

from tests.e2e.server import Server


def niceness_of_threads(pid: int) -> set[int]:
    return {os.getpriority(os.PRIO_PROCESS, thread.id) for thread in psutil.Process(pid).threads()}


def test_every_thread_of_the_daemon_gives_way_to_the_api(server: Server) -> None:
    assert server.process is not None
    assert server.daemon_pid is not None
    assert min(niceness_of_threads(server.daemon_pid)) > max(niceness_of_threads(server.process.pid))


def test_the_daemon_is_in_the_session_of_the_api_but_not_in_its_group(server: Server) -> None:
    """Linux compares niceness within a session, where it groups by them; a terminal signals a group."""
    assert server.process is not None
    assert server.daemon_pid is not None
    assert os.getsid(server.daemon_pid) == os.getsid(server.process.pid)
    assert os.getpgid(server.daemon_pid) != os.getpgid(server.process.pid)
