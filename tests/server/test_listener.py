"""The socket on which the server listens."""

import asyncio
import socket
from pathlib import Path

from server.serve import _bind
from server.settings import Settings


def test_an_answer_is_sent_at_once(tmp_path: Path) -> None:
    """Nagle's algorithm would hold an answer's body back until its head is acknowledged, 40 ms later."""
    nodelay: list[int] = []

    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nodelay.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async def ask() -> None:
        listener = _bind(Settings(data_dir=tmp_path, port=0))
        async with await asyncio.start_server(answer, sock=listener):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            await reader.read()
            writer.close()

    asyncio.run(ask())
    assert nodelay == [1]
