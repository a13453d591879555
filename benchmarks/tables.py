"""README's tables and plots, made from the records under benchmarks/results; never by hand.

    python -m benchmarks.tables [--check] [--readme README.md] [--results benchmarks/results]

Rewrites what stands between markers and leaves all other text as it is:

    <!-- benchmarks: throughput preset=llama-60m precision=bf16 -->
    <!-- end -->

The sections are those of `sections.SECTIONS` and `throughput-plot`; the words after the name choose records by their
fields. The newest record of each kind and machine counts. Every table ends with the command, the machine, the commit
and the date of its records.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import sections, throughput_plot
from benchmarks.kernels import plot as roofline
from benchmarks.pictures import shown_by
from benchmarks.records import KERNELS, RESULTS, digest

PLOTS = "throughput-plot"
"""The section that shows pictures, for which it must know where the document is."""
MARKER = re.compile(r"<!-- benchmarks: (?P<name>[\w-]+)(?P<words>(?: \w+=\S+)*) -->\n")
ANY_MARKER = re.compile(r"<!-- benchmarks:.*")
END = "<!-- end -->"


def render(text: str, results: Path, link: str) -> str:
    """A document with every section made anew.

    Args:
        text: the document.
        results: folder of the records.
        link: the same folder, as the document's links write it.

    Raises:
        ValueError: a marker is misspelt, names no section, or has no end.
    """
    done, rest = "", text
    while found := ANY_MARKER.search(rest):
        marker = MARKER.match(rest, found.start())
        if marker is None:
            raise ValueError(
                f"{found.group()!r} is no marker: write <!-- benchmarks: NAME field=value ... -->"
            )
        body, end, after = rest[marker.end() :].partition(END)
        if not end or ANY_MARKER.search(body):
            raise ValueError(f"{marker.group().strip()!r} has no {END} before the next marker: add it")
        made = section(marker, results, link)
        done += rest[: marker.end()] + (f"\n{made}\n\n" if made else "") + END
        rest = after
    return done + rest


def section(marker: re.Match[str], results: Path, link: str) -> str:
    """What belongs between a marker and its end."""
    name = marker["name"]
    chosen = dict(word.split("=", 1) for word in marker["words"].split())
    if name == PLOTS:
        return throughput_plot.as_markdown(results, link)
    if name not in sections.SECTIONS:
        raise ValueError(f"no section is named {name!r}: there are {', '.join([*sections.SECTIONS, PLOTS])}")
    return sections.SECTIONS[name](results, chosen)


def stale_plots(results: Path) -> dict[Path, Callable[[], None]]:
    """Every picture whose records changed since it was drawn, and how to draw it."""
    shown = [(throughput_plot.draw, throughput_plot.pictures(results))]
    shown += [(roofline.draw, roofline.pictures(results / KERNELS))]
    return {
        path: functools.partial(draw, records, path)
        for draw, pictures in shown
        for path, records in pictures.items()
        if shown_by(path) != digest(records)
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the document and draw what is stale; with --check, only say whether anything would change."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description="Make README's tables.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 4 if anything would change")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    link = Path(os.path.relpath(arguments.results, arguments.readme.resolve().parent)).as_posix()
    for name in sections.missing(arguments.results):
        print(f"{arguments.results / name} is not there: {sections.MAKERS[name]} writes it", file=sys.stderr)
    try:
        old = arguments.readme.read_text(encoding="utf-8")
        new, stale = render(old, arguments.results, link), stale_plots(arguments.results)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    changed = [str(arguments.readme)] * (new != old) + [str(path) for path in stale]
    if arguments.check:
        for name in changed:
            print(f"{name} does not show the newest records: make bench-tables")
        return 4 if changed else 0
    if new != old:
        arguments.readme.write_text(new, encoding="utf-8")
    for draw in stale.values():
        draw()
    print("\n".join(f"wrote {name}" for name in changed) or "README and plots show the newest records")
    return 0


if __name__ == "__main__":
    sys.exit(main())
