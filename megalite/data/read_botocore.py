"""English prose from the installed botocore package: the documentation in its service descriptions."""

from __future__ import annotations

import gzip
import html
import json
import re
import zlib
from collections.abc import Iterator
from typing import Any

from megalite.data.documents import CorruptInputError, Document, OnBad, first_line

SHORTEST = 80
"""Characters below which a documentation string is a label rather than prose."""


def read_botocore(path: str, on_bad: OnBad) -> Iterator[Document]:
    """The documentation strings of one service description, stripped of HTML; positions number them."""
    try:
        opener = gzip.open if path.endswith(".gz") else open
        with opener(path, "rb") as stream:
            service = json.load(stream)
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        on_bad(CorruptInputError(f"{path}: not a readable service description ({first_line(error)})"))
        return
    for entry, text in enumerate(_documentation(service)):
        stripped = re.sub(r"<[^>]*>", "", re.sub(r"</(p|li|dd|dt|h\d)>|<br */?>", "\n", text))
        prose = re.sub(r"[ \t]+", " ", html.unescape(stripped))
        prose = re.sub(r" ?\n\s*", "\n", prose).strip()
        if len(prose) >= SHORTEST:
            yield Document((prose + "\n").encode("utf-8"), entry)


def _documentation(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for name, value in node.items():
            if name == "documentation" and isinstance(value, str):
                yield value
            else:
                yield from _documentation(value)
    elif isinstance(node, list):
        for value in node:
            yield from _documentation(value)
