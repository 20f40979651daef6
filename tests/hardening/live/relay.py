"""A loopback relay in front of a real server: it presents any certificate, or none at all, and keeps what it is sent.

Used where a row is about the server's certificate or protocol alone: the real RabbitMQ or Redis behind it answers, so
that a connection that succeeds is a real one, and no server has to be started for each certificate. It asks for no
client certificate either, which Celery's own settings do not send and the servers insist on.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from asyncio import StreamReader, StreamWriter
from contextlib import suppress
from types import TracebackType

from stack.pki import Pair


class Relay:
    """Relays every connection to ``upstream``, over TLS with ``client``'s certificate.

    Args:
        upstream: port of the real server on 127.0.0.1.
        client: what the relay connects to the real server with.
        server: TLS context of what it presents; ``None`` speaks plain text.
        host: the loopback address to listen on.
    """

    def __init__(
        self, upstream: int, client: Pair, server: ssl.SSLContext | None = None, host: str = "127.0.0.1"
    ) -> None:
        # Not what is tested: the relay's own way to the real server, both on this host.
        self._client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._client.check_hostname = False
        self._client.verify_mode = ssl.CERT_NONE
        self._client.load_cert_chain(client.certificate, client.key)
        self._upstream = upstream
        self._writers: list[StreamWriter] = []
        #: What clients sent: on a plain relay the bytes on the wire, on a TLS one what was inside.
        self.received = bytearray()
        #: Protocol version of each handshake that succeeded.
        self.versions: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        listening = asyncio.start_server(self._relay, host, 0, ssl=server)
        self._listener = asyncio.run_coroutine_threadsafe(listening, self._loop).result(5)
        self.port: int = self._listener.sockets[0].getsockname()[1]

    def __enter__(self) -> Relay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening and cut every connection; a second call does nothing."""
        if not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result(5)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5)
            self._loop.close()

    async def _cut(self) -> None:
        self._listener.close()
        for writer in self._writers:
            with suppress(AttributeError):  # Python 3.11, for a connection that is gone already
                writer.transport.abort()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    async def _relay(self, reader: StreamReader, writer: StreamWriter) -> None:
        self._writers.append(writer)
        if protected := writer.get_extra_info("ssl_object"):
            self.versions.append(protected.version())
        upstream, answer = await asyncio.open_connection("127.0.0.1", self._upstream, ssl=self._client)
        self._writers.append(answer)
        await asyncio.gather(_pump(reader, answer, self.received), _pump(upstream, writer, bytearray()))


def presents(pair: Pair) -> ssl.SSLContext:
    """Return a context for a server with this certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    return context


async def _pump(source: StreamReader, target: StreamWriter, record: bytearray) -> None:
    with suppress(OSError):
        while data := await source.read(65536):
            record += data
            target.write(data)
            await target.drain()
    target.close()
