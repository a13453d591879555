"""``megalite import FOLDER OUT``: check a Hugging Face folder, and make it one to train from."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Annotated

import tyro

from megalite.cli.config_file import parse
from megalite.config_values import to_dict
from megalite.errors import ExitCode


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Read a Hugging Face model, refuse what would compute something else here, and write it in plain form.

    The folder written works as `train.init_from` of pretrain, and with sample and export. Its tensors are
    those of the model to the last bit.
    """

    folder: Annotated[str, tyro.conf.Positional]
    """Hugging Face folder: config.json, safetensors (one file, or several with an index), tokenizer.json."""
    out: Annotated[str, tyro.conf.Positional]
    """Folder to write; must not exist or be empty."""
    json: bool = False
    """Print one JSON object as the last line."""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    arguments = parse(Arguments, argv, prog="megalite import")
    from megalite.interop.hf import config_from_hf, copy_folder, read_config_json
    from megalite.models.families import piece_shapes

    target = copy_folder(arguments.folder, arguments.out)
    config = config_from_hf(read_config_json(target))
    parameters = sum(math.prod(shape) for shape in piece_shapes(config).values())
    print(
        f"imported a {config.family} model of {parameters:,} parameters to {target}\n"
        f"train it further with: megalite pretrain CONFIG.toml --train.init-from {target}"
    )
    if arguments.json:
        print(json.dumps({"folder": str(target), "parameters": parameters, "model": to_dict(config)}))
    return ExitCode.DONE
