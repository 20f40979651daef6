"""Make a thumbnail of an uploaded image. Someone waits for the answer, so the result is kept (signed, and for a while).

Safe to run twice: a thumbnail is named after its image's content, and written as a whole. What cannot be read now
cannot be read later either, so nothing is tried again.
"""

from __future__ import annotations

import hashlib
import os
import stat
from io import BytesIO
from pathlib import Path
from typing import Annotated

from celery import Task, shared_task
from PIL import Image
from pydantic import Field

from ..hardening.files import replace_file

#: A name without a slash: what is asked for lies in the folder, or the task does not run.
Key = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,99}$")]
MAX_BYTES = 20 * 1024 * 1024
MAX_PIXELS = 24_000_000  # 100 MB of memory when decoded, however small the file is
SIZE = (256, 256)


@shared_task(bind=True, ignore_result=False, time_limit=60, soft_time_limit=50)
def thumbnail(self: Task, key: Key) -> dict[str, str | int]:
    """Return the object's checksum and size, and the thumbnail's name."""
    settings = self.app.hardening.settings
    content = read(settings.upload_folder / key)
    checksum = hashlib.sha256(content).hexdigest()
    target = settings.output_folder / f"{checksum}.png"
    if not target.exists():
        replace_file(target, shrink(content))
    return {"sha256": checksum, "bytes": len(content), "thumbnail": target.name}


def read(path: Path) -> bytes:
    """Read a file: no link, no pipe, and no more than the limit, whatever its size was said to be."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("the object is not a file")
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"the object is larger than {MAX_BYTES} bytes")
    return content


def shrink(content: bytes) -> bytes:
    """Return a small copy without anything but the picture."""
    with Image.open(BytesIO(content), formats=("JPEG", "PNG")) as image:  # reads the header, decodes nothing yet
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"the image has more than {MAX_PIXELS} pixels")
        image.thumbnail(SIZE)
        small = BytesIO()
        image.convert("RGB").save(small, "PNG")
    return small.getvalue()
