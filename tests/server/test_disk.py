"""The ballast, on a disk that is really full: a small file system of this test's own."""

import shutil
import subprocess
import sys

import pytest

from server import children

MOUNT = ("unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=40m none /mnt && exec "$@"', "sh")
CODE = """
import subprocess
from pathlib import Path
from sqlalchemy import URL, text
from sqlalchemy.exc import OperationalError
from server.db.session import Database
from server.disk import BALLAST_BYTES, Disk, is_full
from server.settings import Settings

disk, ballast = Disk(Settings(data_dir=Path("/mnt"), min_free_disk_mib=4)), Path("/mnt/ballast")
database = Database(URL.create("sqlite", database="/mnt/tables.db"))

def write():
    with database.write() as session:
        session.execute(text("INSERT INTO things VALUES (zeroblob(100000))"))

with database.write() as session:
    session.execute(text("CREATE TABLE things (thing)"))
disk.tend_ballast()
assert ballast.stat().st_blocks * 512 == BALLAST_BYTES, "it takes its room for real"
with Path("/mnt/others").open("wb", buffering=0) as others:
    try:
        while True:
            others.write(bytes(4096))  # the last one by part
    except OSError as error:
        assert is_full(error)
try:
    write()
    raise AssertionError("the disk was not full")
except OperationalError as error:
    assert is_full(error), error
assert disk.is_low
disk.tend_ballast()
assert not ballast.exists()
write()
disk.tend_ballast()
assert not ballast.exists(), "there is no room for it yet"
Path("/mnt/others").unlink()
disk.tend_ballast()
assert ballast.exists()
assert not disk.is_low
database.close()
subprocess.run(["mount", "-o", "remount,ro", "/mnt"], check=True)
disk.give_up_ballast()
assert ballast.exists()
subprocess.run(["mount", "-o", "remount,rw", "/mnt"], check=True)
disk.give_up_ballast()
subprocess.run(["mount", "-o", "remount,ro", "/mnt"], check=True)
disk.tend_ballast()
assert not ballast.exists()
print("went well")
"""


def test_on_a_full_disk_the_ballast_makes_room_for_rows_and_is_restored_later() -> None:
    """One that may not be written any more is no error: who writes other things to it finds out, and waits."""
    if shutil.which("unshare") is None or subprocess.run([*MOUNT, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs `unshare -Urm` and a tmpfs: user namespaces are not allowed here")
    done = subprocess.run(
        [*MOUNT, sys.executable, "-c", CODE], env=children.environment(), capture_output=True, text=True, check=False
    )
    assert done.stdout == "went well\n", done.stderr
