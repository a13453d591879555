"""``python -m megalite``: the same as the ``megalite`` command (and what torchrun starts)."""

from __future__ import annotations

from megalite.cli.main import entry

if __name__ == "__main__":
    entry()
