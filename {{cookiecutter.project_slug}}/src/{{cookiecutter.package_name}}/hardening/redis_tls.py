"""The connection that Redis results travel on: it trusts the configured CA and no other.

Guards against: redis-py *adding* ``ssl_ca_certs`` to the operating system's store, so that any public CA (or
a proxy whose CA an administrator installed) could vouch for the server; parameters that switch verification
off; and a handshake that never ends.
Rests on: redis-py wrapping its socket in ``_wrap_socket_with_ssl``, which a test keeps an eye on.
Controls: TLS-1.
"""

from __future__ import annotations

import socket
import ssl

import redis

from .tls import CIPHERS, MINIMUM_VERSION

#: Seconds. A server that speaks no TLS may take the greeting for a long line, and wait for its end.
HANDSHAKE_TIMEOUT = 5.0


class VerifiedSSLConnection(redis.SSLConnection):
    """A TLS connection whose verification no option, URL parameter or default can weaken.

    Celery's Redis backend takes its connection class from ``connection_class_ssl``, and for ``rediss://``
    from ``_params_from_url``: a subclass of the backend has to name this class in both places.
    """

    def _wrap_socket_with_ssl(self, sock: socket.socket) -> ssl.SSLSocket:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # CERT_REQUIRED, and the host name is checked
        context.minimum_version = MINIMUM_VERSION
        context.set_ciphers(CIPHERS)
        if self.ca_certs is None:
            context.load_default_certs()
        else:
            context.load_verify_locations(self.ca_certs)
        if self.certfile is not None:
            context.load_cert_chain(self.certfile, self.keyfile)
        sock.settimeout(HANDSHAKE_TIMEOUT)
        try:
            protected = context.wrap_socket(sock, server_hostname=self.host)
        except TimeoutError:
            raise redis.ConnectionError(
                f"{self.host}:{self.port} began no TLS handshake in {HANDSHAKE_TIMEOUT:.0f} s: is it a plain-text port?"
            ) from None
        protected.settimeout(self.socket_timeout)
        return protected
