"""Flower behind a login: ``python -m <package>.flower`` shows what workers report, and changes nothing.

Guards against: an open Flower and its API; guessed passwords; forged events; a page that another site frames, scripts
or asks for; secrets in arguments or in the environment; a shelve, whose reading executes code; the broker's password
sent over HTTP.
Rests on: Tornado asking ``find_handler`` before any handler exists, so that what is not listed here is refused; and
the role `monitor`, which can neither send tasks nor give orders, whatever Flower would do.
Controls: FLW-1, FLW-2, AUT-4, SIG-1.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import ssl
import time
from collections import deque
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from typing import Annotated, Any

from flower.app import Flower
from flower.events import Events
from flower.options import options
from flower.urls import settings as flower_settings
from flower.views.monitor import Healthcheck, Metrics
from flower.views.tasks import TasksDataTable, TasksView, TaskView
from flower.views.workers import WorkersView, WorkerView
from pydantic import Field
from pydantic_settings import NoDecode
from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop, PeriodicCallback
from tornado.netutil import bind_sockets
from tornado.web import OutputTransform, RequestHandler, StaticFileHandler

from .app import app
from .hardening import ConfigurationRefused, audit
from .hardening.consumer import preflight
from .hardening.files import Watched, read_private_file
from .hardening.identity import Role
from .hardening.policy import COMMANDS
from .hardening.settings import PREFIX
from .settings import COMMAS, Settings

logger = logging.getLogger(__name__)

#: What may be asked for, after the login. Everything else that Flower has, or will have, is refused.
SHOWN = {
    **dict.fromkeys((WorkersView, WorkerView, TasksView, TaskView, StaticFileHandler, Metrics, Healthcheck), ("GET",)),
    TasksDataTable: ("GET", "POST"),  # only looks up; its parameters are too long for an address
}
#: What is said instead, by status.
REFUSALS = {
    401: "Log in.",
    403: "This Flower shows workers and tasks, and nothing else.",
    429: "Too many wrong passwords: wait a minute.",
}
#: Wrong passwords from one address in a minute, after which none is looked at from there.
WRONG, MINUTE = 5, 60.0
#: Bytes in a request's body, and seconds for it to arrive.
BODY, PATIENCE = 64 * 1024, 10.0
#: The one script that is within a page; it never changes.
_SCRIPT = base64.b64encode(hashlib.sha256(b"\nvar autorefresh = 1;\n").digest()).decode()
_HEADERS = {
    # DataTables writes style attributes into the markup that it makes.
    "Content-Security-Policy": f"default-src 'none'; script-src 'self' 'sha256-{_SCRIPT}'; style-src 'self'; "
    "style-src-attr 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Strict-Transport-Security": "max-age=31536000",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Server": "flower",
}


class FlowerSettings(Settings):
    """The service's settings, and Flower's own."""

    #: Where it listens: loopback, or any address if only proxies may connect.
    flower_address: IPv4Address | IPv6Address = IPv4Address("127.0.0.1")
    flower_port: Annotated[int, Field(ge=1, le=65535)] = 5555
    #: Networks of the proxies in front of it: `10.1.2.0/24`. Nobody else but this host may connect.
    flower_proxies: Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode, COMMAS] = ()
    flower_certificate: Path
    flower_key: Path
    #: What a person, or the proxy, logs in with; the user's name does not matter.
    flower_password_file: Path

    def password(self) -> bytes:
        """Read the password.

        Raises:
            ConfigurationRefused: others can read it, or it can be guessed.
        """
        setting = f"{PREFIX}FLOWER_PASSWORD_FILE"
        password = read_private_file(setting, self.flower_password_file).strip()
        if len(password) < 32:
            raise ConfigurationRefused(
                setting, "holds fewer than 32 characters", "generate one: `openssl rand -base64 33`"
            )
        return password

    def server_tls(self) -> ssl.SSLContext:
        """The TLS server.

        Raises:
            ConfigurationRefused: a file cannot be used, or others can read the key.
        """
        read_private_file(f"{PREFIX}FLOWER_KEY", self.flower_key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        try:
            context.load_cert_chain(self.flower_certificate, self.flower_key)
        except OSError as error:
            raise ConfigurationRefused(
                f"{PREFIX}FLOWER_CERTIFICATE", f"cannot be used with its key ({error})", "issue both together"
            ) from error
        return context


class Login:
    """Decides who may go on, by address and password."""

    def __init__(self, settings: FlowerSettings) -> None:
        if not (settings.flower_address.is_loopback or settings.flower_proxies):
            raise ConfigurationRefused(
                f"{PREFIX}FLOWER_ADDRESS",
                "is open to other hosts, and no proxy is named",
                f"listen on 127.0.0.1, or set {PREFIX}FLOWER_PROXIES to the proxies' networks",
            )
        self._proxies = settings.flower_proxies
        self._password = settings.password()
        self._wrong: dict[str, deque[float]] = {}
        #: How Flower itself knows everybody who came past here.
        self.credentials = f"user:{self._password.decode()}"
        self.cookie_secret = hmac.digest(self._password, b"flower cookies", "sha256").hex()

    def refusal(self, request: Any) -> int:
        """Return the status to refuse a request with, or 0 if it may go on."""
        address, now = str(request.remote_ip), time.monotonic()
        if not ip_address(address).is_loopback and not any(ip_address(address) in each for each in self._proxies):
            return 403
        wrong = self._wrong.setdefault(address, deque(maxlen=WRONG))
        if len(wrong) == WRONG and now - wrong[0] < MINUTE:
            return 429
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        try:
            given = base64.b64decode(token, validate=True).strip()  # oauth2-proxy sends a file's last newline too
        except ValueError:
            given = b""
        wanted = b":" + self._password
        if kind == "Basic" and hmac.compare_digest(given[-len(wanted) :], wanted):
            request.headers["Authorization"] = f"Basic {base64.b64encode(self.credentials.encode()).decode()}"
            return 0
        if kind:
            wrong.append(now)
            audit.record(audit.Event.LOGIN_REFUSED, address=address)
        self._wrong = {each: times for each, times in self._wrong.items() if times and now - times[-1] < MINUTE}
        return 401


class Refusal(RequestHandler):
    """Says no in one sentence."""

    def initialize(self, status: int) -> None:
        """Take the status to answer with."""
        self._refusal = status

    def check_xsrf_cookie(self) -> None:
        """Refuse without looking at more of the request."""

    def prepare(self) -> None:
        """Answer."""
        self.set_status(self._refusal)
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        if self._refusal == 401:
            self.set_header("WWW-Authenticate", 'Basic realm="flower", charset="UTF-8"')
        elif self._refusal == 429:
            self.set_header("Retry-After", int(MINUTE))
        self.finish(REFUSALS[self._refusal])


class Headers(OutputTransform):
    """Puts the security headers on every answer."""

    def transform_first_chunk(self, status_code: int, headers: Any, chunk: bytes, finishing: bool) -> Any:
        """Replace what a handler has set."""
        for name, value in _HEADERS.items():
            headers[name] = value
        return status_code, headers, chunk


class SignedEvents(Events):
    """Flower's view of what happens, from signed events alone."""

    def run(self) -> None:
        """Listen with the application's receiver; Flower would take Celery's, which believes everybody."""
        while True:
            try:
                with self.capp.connection_for_read() as connection:
                    self.capp.events.Receiver(connection, handlers={"*": self.on_event}).capture()
            except Exception as error:  # the broker is away, or was
                logger.warning("flower: No events (%s), trying again", type(error).__name__)
                time.sleep(1)


class Monitor(Flower):
    """Flower's application, of which nothing is reached but what is listed, and nothing without the login."""

    def __init__(self, settings: FlowerSettings) -> None:
        hardening = preflight(app, Role.MONITOR, app.hardening.topology.callers)
        self._login = Login(settings)
        options.read_only = True
        options.basic_auth = [self._login.credentials]  # without it Flower would skip its check of a request's origin
        options.debug = False
        tornado: dict[str, Any] = {**flower_settings, "cookie_secret": self._login.cookie_secret}
        tornado["xsrf_cookie_kwargs"] = {"secure": True, "samesite": "Strict"}
        events = SignedEvents(
            app,
            IOLoop.current(),
            enable_events=False,  # a monitor may not; workers send them where SECURE_CELERY_EVENTS says so
            max_tasks_in_memory=10_000,
            max_workers_in_memory=1_000,
        )
        super().__init__(options=options, capp=app, events=events, transforms=[Headers], **tornado)
        may = COMMANDS[Role.MONITOR]
        self.inspector.inspect_methods = tuple(each for each in self.inspector.inspect_methods if each in may)
        audit.record(audit.Event.STARTED, signer=hardening.signer.identity)

    def find_handler(self, request: Any, **kwargs: Any) -> Any:
        """Choose who answers a request, when its headers have been read."""
        status = self._login.refusal(request)
        found = super().find_handler(request, **kwargs)
        if not status and request.method not in SHOWN.get(found.handler_class, ()):
            status = 403
        return self.get_handler_delegate(request, Refusal, {"status": status}) if status else found


def main() -> None:
    """Serve until it is ended."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")

    def renew() -> str:
        server.ssl_options = settings.server_tls()  # of each new connection; half a pair raises, and changes nothing
        return "serves with the new certificate"

    try:
        settings = FlowerSettings()
        files = Watched("credentials", (settings.flower_certificate, settings.flower_key), flower=renew)
        monitor, context = Monitor(settings), settings.server_tls()
    except ConfigurationRefused as refusal:
        raise SystemExit(f"Refused to start. {refusal}") from None
    server = HTTPServer(monitor, ssl_options=context, max_body_size=BODY, body_timeout=PATIENCE)
    PeriodicCallback(files.look, files.LOOK * 1000).start()
    server.add_sockets(bind_sockets(settings.flower_port, str(settings.flower_address)))
    logger.info("flower: Serving on https://%s:%d", settings.flower_address, settings.flower_port)
    monitor.start()


if __name__ == "__main__":
    main()
