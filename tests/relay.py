"""A network between a client and PostgreSQL, which may lose what it carries."""

import socket
import threading
from contextlib import suppress

from sqlalchemy import URL


class Relay:
    """Listens on a port and leads to the server of a URL, until `end`."""

    def __init__(self, url: URL):
        self.target = url  # of a server at a socket of Unix
        self._flows = threading.Event()
        self._flows.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """The same database by way of the relay."""
        host, port = self._listener.getsockname()
        url = self.target.set(drivername="postgresql", host=host, port=port, query={})
        return url.render_as_string(hide_password=False)

    def swallow(self) -> None:
        """Take what is sent, new connections too, and carry nothing; nobody is told."""
        self._flows.clear()

    def flow(self) -> None:
        """Carry again, also what was kept back."""
        self._flows.set()

    def end(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.flow()

    def _accept(self) -> None:
        with suppress(OSError):  # it has ended
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._join, args=(client,), daemon=True).start()

    def _join(self, client: socket.socket) -> None:
        self._flows.wait()
        with client, socket.socket(socket.AF_UNIX) as server, suppress(OSError):  # the server may be down
            server.connect(f"{self.target.query['host']}/.s.PGSQL.5432")
            back = threading.Thread(target=self._carry, args=(server, client), daemon=True)
            back.start()
            self._carry(client, server)
            back.join()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self._flows.wait()
                sink.sendall(data)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
