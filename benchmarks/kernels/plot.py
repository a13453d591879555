"""A roofline plot of the kernel benchmarks' records.

    python -m benchmarks.kernels.plot benchmarks/results/kernels [--output FILE.png]

For each dtype: above, every case by its FLOPs per byte and the rate it reaches, under the roof that the best copy and
the best matrix product of the same records make; below, the share of that roof's time, for us and for everything
else that was measured. Forward and backward together, or the forward of what has no backward; the newest record of
each counts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.pictures import save
from benchmarks.records import Record, digest, read

OURS = "megalite"
STYLE = {
    OURS: ("o", "#d1495b"),
    "torch": ("s", "#8d99ae"),
    "compile": ("D", "#2e4057"),
    "liger": ("^", "#66a182"),
    "quack": ("v", "#edae49"),
    "cce": ("<", "#00798c"),
    "flash_attn": (">", "#7b4b94"),
    "apex": ("P", "#a0785a"),
}


@dataclass(frozen=True, slots=True)
class Roof:
    """What a device reaches in one dtype."""

    bytes_per_s: float
    flops_per_s: float

    def seconds(self, record: Record) -> float:
        """Least time for the record's bytes and FLOPs."""
        return max(record["bytes"] / self.bytes_per_s, record["flops"] / self.flops_per_s)

    def share(self, record: Record) -> float:
        """Of the roof that the record reaches."""
        return 1e3 * self.seconds(record) / float(record["median_ms"])


def pictures(folder: Path) -> dict[Path, list[Record]]:
    """The plot of each device type in a folder's records, and what it shows."""
    found: dict[Path, list[Record]] = {}
    for record in read(folder):
        found.setdefault(folder / f"roofline_{record['device_type']}.png", []).append(record)
    return found


def roof_of(records: Sequence[Record], dtype: str) -> Roof:
    """From the best copy of at least 16 MB and the best product of a dtype.

    Raises:
        ValueError: the records hold no copy or no product.
    """
    copies = [r["bytes"] / r["best_ms"] for r in records if r["variant"] == "copy" and r["bytes"] >= 1 << 24]
    products = [
        r["flops"] / r["best_ms"] for r in records if r["variant"] == "product" and r["dtype"] == dtype
    ]
    if not copies or not products:
        raise ValueError(f"the records hold no copy of 16 MB or no product in {dtype}: measure again")
    return Roof(1e3 * max(copies), 1e3 * max(products))


def newest(records: Sequence[Record], dtype: str) -> dict[tuple[str, str], Record]:
    """(label, variant) to its newest record with the most passes, yardsticks left out."""
    found: dict[tuple[str, str], Record] = {}
    for record in records:
        if record["dtype"] != dtype or record["variant"] in ("copy", "product"):
            continue
        key = (label(record), record["variant"])
        old = found.get(key)
        if old is None or record["pass"] != "forward" or old["pass"] == "forward":
            found[key] = record
    return found


def label(record: Record) -> str:
    """A case and its shape."""
    sizes = " ".join(f"{letter}{_short(size)}" for letter, size in record["shape"].items())
    return f"{record['case']}  {sizes}"


def _short(size: int) -> str:
    return f"{size >> 20}M" if size >= 1 << 20 else str(size)


def draw(records: Sequence[Record], path: Path) -> None:
    """Draw records of one device into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dtypes = sorted({record["dtype"] for record in records})
    most = max(len({name for name, _ in newest(records, dtype)}) for dtype in dtypes)
    figure, axes = plt.subplots(
        2,
        len(dtypes),
        figsize=(8.2 * len(dtypes), 6.0 + 0.3 * most),
        squeeze=False,
        gridspec_kw={"height_ratios": [4.4, 0.3 * most + 0.9]},
        layout="constrained",
    )
    for column, dtype in enumerate(dtypes):
        roof, found = roof_of(records, dtype), newest(records, dtype)
        draw_roofline(axes[0][column], roof, found, dtype)
        draw_shares(axes[1][column], roof, found)
    last = max(records, key=lambda record: str(record["time"]))
    figure.suptitle(
        f"{last['device']}, {last['threads']} CPU thread(s), torch {last['versions']['torch']}, "
        f"commit {last['commit']}, {last['time'][:10]}",
        fontsize=10,
    )
    save(figure, path, digest(records), dpi=100)
    plt.close(figure)


def draw_roofline(axes: Any, roof: Roof, found: Mapping[tuple[str, str], Record], dtype: str) -> None:
    """Rates over FLOPs per byte, ours joined with plain torch's by a line."""
    intensity = {name: record["flops"] / record["bytes"] for (name, _), record in found.items()}
    low, high = min(intensity.values()) / 2, max(*intensity.values(), roof.flops_per_s / roof.bytes_per_s) * 3
    ridge = roof.flops_per_s / roof.bytes_per_s
    axes.plot([low, ridge, high], [low * roof.bytes_per_s / 1e9, *[roof.flops_per_s / 1e9] * 2], "k-", lw=1.3)
    axes.text(high, roof.flops_per_s / 1e9 * 1.12, _rate(roof.flops_per_s, "FLOP/s"), ha="right", fontsize=9)
    axes.text(low * 1.1, low * roof.bytes_per_s / 1e9 * 3.5, _rate(roof.bytes_per_s, "B/s"), fontsize=9)
    for name in dict.fromkeys(name for name, _ in found):
        points = {v: r for (n, v), r in found.items() if n == name}
        rates = {v: r["flops"] / r["median_ms"] / 1e6 for v, r in points.items()}
        axes.plot([intensity[name]] * 2, [min(rates.values()), max(rates.values())], color="#cccccc", lw=0.8)
        for variant, rate in rates.items():
            marker, colour = STYLE.get(variant, ("x", "black"))
            axes.plot(intensity[name], rate, marker, color=colour, ms=7 if variant == OURS else 4.5, mew=0)
    axes.set(
        xscale="log", yscale="log", xlim=(low, high), xlabel="FLOPs per byte that must move", ylabel="GFLOP/s"
    )
    axes.set_title(f"{dtype}: rate, and the roof of the best copy and matrix product", fontsize=10)
    axes.grid(True, which="major", color="#eeeeee")
    axes.set_axisbelow(True)


def draw_shares(axes: Any, roof: Roof, found: Mapping[tuple[str, str], Record]) -> None:
    """One row per case: share of the roof, a mark for each variant."""
    names = list(dict.fromkeys(name for name, _ in found))
    names.sort(key=lambda name: roof.share(found[name, OURS]) if (name, OURS) in found else 0.0)
    for row, name in enumerate(names):
        shares = {v: 100 * roof.share(r) for (n, v), r in found.items() if n == name}
        axes.plot([min(shares.values()), max(shares.values())], [row, row], color="#dddddd", lw=1, zorder=1)
        for variant, share in shares.items():
            marker, colour = STYLE.get(variant, ("x", "black"))
            size = 9 if variant == OURS else 6
            axes.plot(share, row, marker, color=colour, ms=size, mew=0, zorder=3 if variant == OURS else 2)
    axes.axvline(100, color="black", lw=1.3)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(
        xlabel="% of the roof (100: as fast as a copy or a matrix product)",
        xlim=(0, None),
        ylim=(-0.7, len(names) - 0.3),
    )
    for variant in dict.fromkeys(variant for _, variant in found):
        marker, colour = STYLE.get(variant, ("x", "black"))
        axes.plot([], [], marker, color=colour, ms=7, mew=0, label=variant)
    axes.legend(loc="lower right", fontsize=9, frameon=True, title="forward (+ backward)", title_fontsize=8)
    axes.grid(True, axis="x", color="#eeeeee")
    axes.set_axisbelow(True)


def _rate(value: float, unit: str) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value / 1e6:.3g} M{unit}"


def main(argv: Sequence[str] | None = None) -> int:
    """Draw one plot for each device in the records."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.plot", description="Draw rooflines.")
    parser.add_argument("folder", type=Path, help="where the .jsonl records are")
    parser.add_argument(
        "--output", type=Path, default=None, help="roofline_DEVICE.png in that folder by default"
    )
    arguments = parser.parse_args(argv)
    found = pictures(arguments.folder)
    if not found:
        parser.error(f"{arguments.folder} holds no records: run python -m benchmarks.kernels first")
    for path, records in found.items():
        draw(records, arguments.output or path)
        print(f"wrote {arguments.output or path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
