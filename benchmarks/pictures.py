"""Saving plots: small PNG files that say which records they show."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

KEY = "Records"
COLOURS = 64
"""Of the palette: a plot of a few colours and their soft edges looks the same, in a third of the bytes."""


def save(figure: Any, path: Path, records: str, dpi: int) -> None:
    """Write a figure as PNG, with the digest of its records in it."""
    from PIL import Image, PngImagePlugin

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    info = PngImagePlugin.PngInfo()
    info.add_text(KEY, records)
    image = Image.open(buffer).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, optimize=True, pnginfo=info)


def shown_by(path: Path) -> str | None:
    """The digest in a picture; None if there is none, or no picture."""
    from PIL import Image

    if not path.exists():
        return None
    with Image.open(path) as image:
        found = image.info.get(KEY)
    return str(found) if found else None
