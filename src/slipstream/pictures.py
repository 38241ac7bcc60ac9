"""Pictures between trainer and server: PNG, which loses nothing."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
"""Of PIL, that PNG has."""
ORIENTATION = 0x0112
"""EXIF's tag for how to turn a picture."""
MOST_PIXELS = 1 << 26
"""Of one picture: a few kilobytes of PNG can stand for gigabytes of memory."""
MOST_PIXELS_TOGETHER = 4 * MOST_PIXELS
"""Of the pictures of one prompt, which are in memory together."""


def as_png_holds_it(picture: Any) -> Any:
    """A PIL image in a mode that PNG has. Trainers take it so, too: a server's processor must see the same."""
    return picture if picture.mode in MODES else picture.convert("RGB")


def to_png(picture: Any) -> bytes:
    """A PIL image as PNG, in another mode if PNG does not have its own."""
    from PIL import Image

    picture, made = as_png_holds_it(picture), io.BytesIO()
    # Quick instead of small. Processors may turn a picture as its EXIF says; the rest is nobody's business, and cameras
    # write some that Pillow reads but cannot write.
    exif, turned = Image.Exif(), picture.getexif().get(ORIENTATION)
    if turned in range(2, 9):
        exif[ORIENTATION] = turned
    picture.save(made, "PNG", compress_level=1, exif=exif.tobytes() if len(exif) else None)
    return made.getvalue()


def all_from_png(data: Sequence[bytes], where: str) -> list[Any]:
    """The PIL images of several PNGs.

    Raises:
        ValueError: One of them is none, it is damaged, or they have too many pixels; `where` names them.
    """
    made: list[Any] = []
    for i, one in enumerate(data):
        left = MOST_PIXELS_TOGETHER - sum(picture.width * picture.height for picture in made)
        made.append(from_png(one, f"{where}: image {i}", left))
    return made


def from_png(data: bytes, where: str, left: int = MOST_PIXELS) -> Any:
    """The PIL image of a PNG.

    Raises:
        ValueError: It is none, it is damaged, or it has more than `MOST_PIXELS` pixels, or than are `left` for it;
            `where` names it.
    """
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(data), formats=["PNG"])
        width, height = picture.size
        if width * height > MOST_PIXELS:
            raise ValueError(f"{width} x {height} pixels, of which it may have {MOST_PIXELS}")
        if width * height > left:
            raise ValueError(
                f"{width} x {height} pixels after those of others: together they may have {MOST_PIXELS_TOGETHER}"
            )
        picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow finds wrong with it
        raise ValueError(f"{where} is no picture in PNG: {error}") from error
    return picture
