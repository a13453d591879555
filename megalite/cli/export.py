"""``megalite export CHECKPOINT OUT``: a folder for transformers and everything that reads its format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megalite.cli.config_file import parse
from megalite.errors import ExitCode


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write the model of a checkpoint as a folder that from_pretrained of transformers loads."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Run directory (its newest checkpoint), checkpoint directory or Hugging Face folder."""
    out: Annotated[str, tyro.conf.Positional]
    """Folder to write; must not exist or be empty."""
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = "stored"
    """Type of the weights; "stored" keeps the checkpoint's (fp32 masters)."""
    json: bool = False
    """Print one JSON object as the last line."""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    arguments = parse(Arguments, argv, prog="megalite export")
    from megalite.interop.hf import DTYPES, copy_folder, find_folder

    source = find_folder(arguments.checkpoint)
    _verify(source.parent)
    target = copy_folder(source, arguments.out, dtype=DTYPES.get(arguments.dtype))
    num_bytes = sum(path.stat().st_size for path in target.iterdir())
    print(f"wrote {source} as {target} ({num_bytes / 1e6:,.1f} MB)")
    if arguments.json:
        print(json.dumps({"source": str(source), "folder": str(target), "bytes": num_bytes}))
    return ExitCode.DONE


def _verify(checkpoint: Path) -> None:
    """Compare a checkpoint's weights with the fingerprints taken when they were saved."""
    from megalite.train.checkpoint import MANIFEST, read_manifest, verify_folder

    if (checkpoint / MANIFEST).is_file():
        tensors = read_manifest(checkpoint)["tensors"]
        verify_folder(checkpoint, {"tensors": {"master": tensors["master"]}})
