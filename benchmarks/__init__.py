"""What each layer costs, beside stock Celery: ``make bench``."""
