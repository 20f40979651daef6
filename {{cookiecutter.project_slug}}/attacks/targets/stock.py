"""Celery exactly as the "Security" page of its guide sets it up: `auth` everywhere, and TLS done right.

A fair opponent: client certificates, the server's chain *and* host name verified, an account of its own. What the guide
does not mention keeps Celery's default, but one setting: results have to be `auth` too, because
`accept_content = ["auth"]` makes Celery refuse to read its own JSON results.
"""

import os
import ssl
from urllib.parse import urlsplit

from celery import Celery

app = Celery("attacks.stock", include=["attacks.targets.tasks"])
environ = os.environ
broker = urlsplit(environ["STOCK_BROKER_URL"])
redis_tls = {
    "ssl_ca_certs": environ["STOCK_TLS_CA"],
    "ssl_certfile": environ["STOCK_TLS_CERTIFICATE"],
    "ssl_keyfile": environ["STOCK_TLS_KEY"],
    "ssl_cert_reqs": ssl.CERT_REQUIRED,
    "ssl_check_hostname": True,
}
amqp_tls = {
    "ca_certs": environ["STOCK_TLS_CA"],
    "certfile": environ["STOCK_TLS_CERTIFICATE"],
    "keyfile": environ["STOCK_TLS_KEY"],
    "cert_reqs": ssl.CERT_REQUIRED,
    "server_hostname": broker.hostname,
}
app.conf.update(
    broker_url=environ["STOCK_BROKER_URL"],
    broker_use_ssl=redis_tls if broker.scheme == "rediss" else amqp_tls,
    broker_login_method="EXTERNAL",  # RabbitMQ's; Redis does not look at it
    result_backend=environ["STOCK_RESULT_BACKEND"],
    redis_backend_use_ssl=redis_tls,
    security_key=environ["STOCK_SECURITY_KEY"],
    security_certificate=environ["STOCK_SECURITY_CERTIFICATE"],
    security_cert_store=environ["STOCK_SECURITY_CERT_STORE"],
    security_digest="sha256",
    task_serializer="auth",
    event_serializer="auth",
    result_serializer="auth",
    accept_content=["auth"],
)
app.setup_security()
