"""The two applications under attack: the same tasks, set up as Celery's guide says and as this project does."""

from pathlib import Path

PACKAGE = next((Path(__file__).resolve().parents[2] / "src").glob("*/hardening/__init__.py")).parents[1].name
"""The project's package. Found, not written down: no file here needs to know its name."""
