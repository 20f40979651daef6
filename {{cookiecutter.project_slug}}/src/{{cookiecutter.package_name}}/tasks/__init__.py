"""This service's tasks: one module each, imported here.

Importing a task imports the application, so that what calls it never reaches Celery's own, unhardened default one.
"""

from ..app import app
from . import notify, report, thumbnail

__all__ = ["app", "notify", "report", "thumbnail"]
