"""Pictures between trainer and server: PNG, which loses nothing."""

from __future__ import annotations

import io
from typing import Any

MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
"""Of PIL, that PNG has."""
MOST_PIXELS = 1 << 26
"""Of one picture: a few kilobytes of PNG can stand for gigabytes of memory."""


def as_png_holds_it(picture: Any) -> Any:
    """A PIL image in a mode that PNG has. Trainers take it so, too: a server's processor must see the same."""
    return picture if picture.mode in MODES else picture.convert("RGB")


def to_png(picture: Any) -> bytes:
    """A PIL image as PNG, in another mode if PNG does not have its own."""
    picture, made = as_png_holds_it(picture), io.BytesIO()
    exif = picture.getexif()
    # Quick instead of small; processors may turn a picture as its EXIF says.
    picture.save(made, "PNG", compress_level=1, **({"exif": exif} if len(exif) else {}))
    return made.getvalue()


def from_png(data: bytes, where: str) -> Any:
    """The PIL image of a PNG.

    Raises:
        ValueError: It is none, it is damaged, or it has too many pixels; `where` names it.
    """
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(data), formats=["PNG"])
        width, height = picture.size
        if width * height > MOST_PIXELS:
            raise ValueError(f"{width} x {height} pixels, of which it may have {MOST_PIXELS}")
        picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow finds wrong with it
        raise ValueError(f"{where} is no picture in PNG: {error}") from error
    return picture
