"""Celery with Redis as its guides set it up, over TLS: what a pushed item does where there is no intake."""

from __future__ import annotations

import os
import ssl

from celery import Celery

app = Celery("stock", broker=os.environ.get("STOCK_BROKER"), set_as_current=False)
app.conf.update(
    broker_use_ssl={
        "ssl_cert_reqs": ssl.CERT_REQUIRED,
        "ssl_ca_certs": os.environ.get("SECURE_CELERY_TLS_CA"),
        "ssl_certfile": os.environ.get("SECURE_CELERY_TLS_CERTIFICATE"),
        "ssl_keyfile": os.environ.get("SECURE_CELERY_TLS_KEY"),
    },
    task_default_queue="stock",
    accept_content=["json"],
)
