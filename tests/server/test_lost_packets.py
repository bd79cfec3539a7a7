"""A network that loses every packet: a small one of this test's own, which leads to the real PostgreSQL."""

import os
import shutil
import subprocess
import sys

import pytest

from server import children
from tests.postgresql import PostgreSQL

NETWORK = ("unshare", "-n") if os.geteuid() == 0 else ("unshare", "-Urn")
"""Root stays root of this machine, or it could not open the socket of a PostgreSQL that is another user's."""
NOTICED_SECONDS = 90
CODE = """
import fcntl, socket, struct, sys, time
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError
from server.db.session import Database, is_outage
from tests.relay import Relay

SIOCSIFFLAGS, IFF_UP = 0x8914, 1

def carry(packets):
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP if packets else 0))

def wait_for_an_answer():
    with database.look() as connection:
        connection.execute(text("SELECT pg_sleep(600)"))

def ask_in_the_middle():
    with database.write() as session:
        session.execute(text("SELECT 1"))
        asking.set()
        lost.wait()
        session.execute(text("SELECT 2"))

def ask_anew():
    lost.wait()
    with Database(url).read():
        pass

carry(True)
url = make_url(Relay(make_url(sys.argv[1])).url).set(drivername="postgresql+psycopg")
database, asking, lost = Database(url, is_patient=True), Event(), Event()  # patient: whatever notices is TCP
with ThreadPoolExecutor() as pool:
    asks = [pool.submit(ask) for ask in (wait_for_an_answer, ask_in_the_middle, ask_anew)]
    asking.wait()
    with database.read() as session:
        while not session.scalar(text("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'")):
            time.sleep(0.05)
    carry(False)
    lost.set()
    began = time.monotonic()
    for ask in asks:
        error = ask.exception()
        assert isinstance(error, DBAPIError) and is_outage(error), error
        print(f"noticed after {time.monotonic() - began:.0f} s", file=sys.stderr)
    carry(True)
with database.write() as session:
    session.execute(text("SELECT 3"))
print("went on", flush=True)
"""


@pytest.mark.slow
def test_packets_that_are_lost_are_noticed_by_tcp_and_when_they_arrive_again_all_is_well(
    postgresql: PostgreSQL,
) -> None:
    """By who waits for an answer, who asks on a connection that was open, and who begins a new one."""
    if (
        shutil.which("unshare") is None
        or subprocess.run([*NETWORK, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip(f"needs `{' '.join(NETWORK)}`: networks of one's own are not allowed here")
    done = subprocess.run(
        [*NETWORK, sys.executable, "-c", CODE, postgresql.new_database()],
        env=children.environment(),
        capture_output=True,
        text=True,
        timeout=NOTICED_SECONDS,
        check=False,
    )
    assert done.stdout == "went on\n", done.stderr
    print(done.stderr)
