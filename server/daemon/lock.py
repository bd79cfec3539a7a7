"""One daemon at a time on a data directory: an flock, which the system itself lets go when its holder dies."""

import fcntl
import logging
import os
import time
from pathlib import Path
from typing import IO

import psutil

log = logging.getLogger("mixloom.daemon")
POLL_SECONDS = 0.2
ORPHAN_SECONDS = 10.0
"""How long a holder whose supervisor is gone may take to end itself before it is killed (it may be stopped)."""


def hold(path: Path, *, supervised: bool) -> IO[str]:
    """Wait for the lock, and keep it as long as the returned file is open. `supervised`: our parent watches over us."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
    began = time.monotonic()
    told = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if not told:
                log.warning("waiting_for_lock", extra={"fields": {"path": str(path)}})
                told = True
            if time.monotonic() - began > ORPHAN_SECONDS:
                _kill_orphan(path)
        time.sleep(POLL_SECONDS)
    file.seek(0)
    file.truncate()
    file.write(f"{os.getpid()} {os.getppid()}" if supervised else f"{os.getpid()}")
    file.flush()
    return file


def _kill_orphan(path: Path) -> None:
    """End the holder that its supervisor has left: it was to end by itself, and everything it did is recoverable."""
    numbers = path.read_text().split()
    if len(numbers) != 2:  # nobody supervises it
        return
    pid, parent = map(int, numbers)
    try:
        holder = psutil.Process(pid)
        if holder.ppid() != parent and "daemon" in holder.cmdline():
            log.warning("killing_orphan", extra={"fields": {"pid": pid}})
            holder.kill()
    except psutil.NoSuchProcess:
        return
