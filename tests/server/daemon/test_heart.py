"""Whom the watch over a loop ends, whatever the heartbeats wait for."""

import subprocess
import sys
from pathlib import Path

from server import children
from server.daemon.heart import EXIT_HUNG
from server.db.migrate import upgrade
from server.settings import Settings

HANGS = """
import sys, time
from sqlalchemy import text
from server.daemon.books import Books
from server.daemon.heart import Heart
from server.daemon.pulse import Pulse
from server.db.session import Database
from server.settings import Settings

database = Database(Settings(data_dir=sys.argv[1]).database)
pulse = Pulse(hang_seconds=1)
with Heart(Books.begin(database, lease_seconds=1.5), pulse), database.write() as session:
    session.execute(text("UPDATE daemons SET state = 'ready'"))
    pulse.beat()
    time.sleep(60)
"""


def test_a_loop_that_hangs_with_the_database_locked_is_ended_as_soon(tmp_path: Path) -> None:
    upgrade(Settings(data_dir=tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path)], env=children.environment(), capture_output=True, timeout=25
    )
    assert done.returncode == EXIT_HUNG
    assert b'File "<string>", line 15' in done.stderr, "where it hangs"
