"""The victims: tasks that leave a file, so that an attack is judged by what happened and not by what was logged.

Nothing here is part of the service; the two target applications load these tasks and nothing else.
"""

import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

from celery import shared_task
from celery.exceptions import SoftTimeLimitExceeded
from celery.signals import task_failure, task_revoked

EFFECTS = "ATTACK_EFFECTS"


def leave(effect: str, **details: Any) -> None:
    """Leave one file per execution in the folder that the environment names."""
    folder = Path(os.environ[EFFECTS])
    name = f"{effect}-{uuid.uuid4().hex}"
    (folder / f".{name}").write_text(json.dumps({"effect": effect, "pid": os.getpid(), **details}))
    (folder / f".{name}").rename(folder / name)


@task_failure.connect
def failed(sender: Any = None, **_: Any) -> None:
    """A task that failed has come to its end too."""
    leave("failed", task=getattr(sender, "name", None))


@task_revoked.connect
def dropped(sender: Any = None, **_: Any) -> None:
    """So has one that came too late."""
    leave("dropped", task=getattr(sender, "name", None))


@shared_task(name="attacks.ping")
def ping(token: str) -> None:
    """The honest message: it is sent before, behind and after every attack, and must be served."""
    leave("ping", token=token)


@shared_task(name="attacks.pay", ignore_result=False)
def pay(amount: int) -> int:
    """What the client may do."""
    leave("pay", amount=amount)
    return amount


@shared_task(name="attacks.pay_once", bind=True, ignore_result=False)
def pay_once(self: Any, amount: int) -> int:
    """Careful: what is delivered again may have been paid already."""
    leave("skipped" if self.request.delivery_info.get("redelivered") else "pay", amount=amount)
    return amount


@shared_task(name="attacks.refund", ignore_result=False)
def refund(amount: int) -> int:
    """Takes the same arguments as `pay`, and nobody asked for it."""
    leave("refund", amount=amount)
    return amount


@shared_task(name="attacks.wipe")
def wipe(account: str) -> None:
    """What a client may not do."""
    leave("wipe", account=account)


@shared_task(name="attacks.report")
def report(number: int) -> None:
    """What the client may have now and then."""
    leave("report", number=number)


@shared_task(name="attacks.notify")
def notify(request: Any, error: Any, traceback: Any) -> None:
    """An errback in the form that Celery calls where the failure is noticed."""
    leave("notify")


@shared_task(name="attacks.work", ignore_result=False)
def work(seconds: float) -> str:
    """Takes its time, whatever the soft limit says."""
    try:
        time.sleep(seconds)
    except SoftTimeLimitExceeded:
        time.sleep(seconds)
    leave("work", seconds=seconds)
    return "done"


@shared_task(name="attacks.flaky", bind=True, max_retries=1, ignore_result=False)
def flaky(self: Any, order: str) -> str:
    """Fails once and is tried again by the worker."""
    if self.request.retries == 0:
        raise self.retry(countdown=0)
    leave("flaky", order=order)
    return order
