"""Celery's own integration tests against a hardened application, beside stock Celery: ``make celery-suite``."""
