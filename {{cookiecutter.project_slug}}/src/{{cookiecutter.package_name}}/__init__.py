"""A Celery service."""
