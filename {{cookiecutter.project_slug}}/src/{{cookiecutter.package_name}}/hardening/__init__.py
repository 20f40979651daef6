"""The hardening layer: self-contained, so that it can be copied into any Celery application.

    from .hardening import Settings, harden

    app = Celery("orders")
    harden(app, Settings())

It signs and verifies every message (envelope), refuses what is not signed, fresh, addressed here and allowed (gate),
survives whatever a broker delivers (intake), keeps what it refused (quarantine) and signs results.

``__version__`` is the template's, and its tag's after a ``v``: a copy can be compared with newer ones.
"""

from .errors import ConfigurationRefused, MessageRefused, Refused
from .harden import harden
from .settings import Settings

__version__ = "1.0.0"
__all__ = ["ConfigurationRefused", "MessageRefused", "Refused", "Settings", "harden"]
