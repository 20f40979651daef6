"""Flower's certificate is replaced while it runs, as it is each week in a cluster (FLW-1)."""

from __future__ import annotations

import shutil
import socket
import ssl
from pathlib import Path

from cryptography import x509

from stack import Stack
from stack.pki import Pair
from stack.process import Process, wait_until

from .running import SOON

HOSTS = ("127.0.0.1", "localhost")


def flower(stack: Stack) -> Process:
    """The process that serves."""
    [process] = [process for process, _ in stack.status() if process.name == "flower"]
    return process


def served(stack: Stack) -> int:
    """The serial number of the certificate that a new connection is shown; its key must be the right one."""
    port = int(stack.environment("flower")["SECURE_CELERY_FLOWER_PORT"])
    context = ssl.create_default_context(cafile=stack.pki.tls.certificate)
    with (
        socket.create_connection((HOSTS[0], port), SOON) as plain,
        context.wrap_socket(plain, server_hostname=HOSTS[0]) as connection,
    ):
        certificate = connection.getpeercert(binary_form=True)
    assert certificate
    return x509.load_der_x509_certificate(certificate).serial_number


def refusals(stack: Stack) -> int:
    """How often Flower has said that it does not take what the files hold."""
    return Path(flower(stack).log).read_text(encoding="utf-8").count('"event": "credentials.refused", "flower": ')


def test_a_new_certificate_is_served_without_a_restart(stack: Stack) -> None:
    before, pid = served(stack), flower(stack).pid
    pair = stack.pki.tls.server("flower", HOSTS)
    assert pair.serial != before
    wait_until(lambda: served(stack) == pair.serial, "the new certificate", SOON)
    assert flower(stack).pid == pid


def test_half_a_pair_leaves_the_old_one_in_force(stack: Stack) -> None:
    settings = stack.environment("flower")
    pair = Pair(Path(settings["SECURE_CELERY_FLOWER_CERTIFICATE"]), Path(settings["SECURE_CELERY_FLOWER_KEY"]))
    wait_until(lambda: served(stack) == pair.serial, "the certificate of the files", SOON)
    before, said, pid = pair.serial, refusals(stack), flower(stack).pid
    later = stack.pki.tls.server("flower-later", HOSTS)
    shutil.copyfile(later.certificate, pair.certificate)
    wait_until(lambda: refusals(stack) > said, "a word about the half", SOON)
    assert [served(stack) for _ in range(3)] == [before] * 3
    shutil.copyfile(later.key, pair.key)
    wait_until(lambda: served(stack) == later.serial, "the new certificate", SOON)
    assert flower(stack).pid == pid
