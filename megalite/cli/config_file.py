"""Configuration from a TOML file and the command line: file over preset, command line over file."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, TypeVar

import tyro

from megalite.config import DatasetSpec, RunConfig
from megalite.config_values import from_dict, to_dict
from megalite.errors import UserError
from megalite.models.presets import preset

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
R = TypeVar("R", bound=RunConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainArguments(RunConfig):
    """Pre-train a base model: megalite pretrain [CONFIG.toml] [--any.field value ...]

    Fields come from the preset, then the file, then the command line. `[model.rope_scaling]` can only be
    given in the file.
    """

    dataset: tuple[str, ...] = ()
    """Prepared dataset folders, as PATH or PATH=WEIGHT; replaces [data] datasets."""
    init_from: str = ""
    """Hugging Face folder to start from; the same as --train.init-from."""
    profile: bool = False
    """Write a profiler trace into the run directory; the same as --train.profile."""
    json: bool = False
    """Print one JSON object with the run's results as the last line."""


def read_toml(path: Path) -> dict[str, Any]:
    """Contents of a TOML file.

    Raises:
        UserError: there is no such file, or it is not TOML (the message has the line).
    """
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise UserError(f"configuration {path} does not exist") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None


def write_toml(config: RunConfig) -> str:
    """A run's whole configuration as TOML; `read_toml` and `from_dict` give the same configuration back."""
    import tomli_w

    return tomli_w.dumps(to_dict(config))


def config_from_file(path: Path, preset_name: str = "") -> RunConfig:
    """A run's configuration from a file, on top of its (or the given) preset."""
    return config_from_values(read_toml(path), preset_name)


def config_from_values(values: dict[str, Any], preset_name: str = "") -> RunConfig:
    """A run's configuration from nested values, on top of its (or the given) preset."""
    values = dict(values)
    if preset_name:
        values["preset"] = preset_name
    name = values.get("preset", "")
    if name:
        given = values.get("model", {})
        values["model"] = {**to_dict(preset(name)), **given}
    return from_dict(RunConfig, values)


def parse_pretrain(argv: list[str]) -> tuple[RunConfig, bool]:
    """The run's configuration and whether JSON was asked for, from ``[CONFIG.toml] [--any.field value ...]``."""
    arguments, config = parse_run(PretrainArguments, argv, prog="megalite pretrain")
    train = dataclasses.replace(
        config.train,
        init_from=arguments.init_from or config.train.init_from,
        profile=arguments.profile or config.train.profile,
    )
    config = dataclasses.replace(config, train=train)
    if arguments.dataset:
        datasets = tuple(_dataset_spec(text) for text in arguments.dataset)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, datasets=datasets))
    return config, arguments.json


def parse_run(kind: type[R], argv: list[str], *, prog: str) -> tuple[R, RunConfig]:
    """``[CONFIG.toml] [--any.field value ...]`` of a command that takes a run's configuration and more.

    Args:
        kind: `RunConfig` with further fields.

    Returns:
        The arguments, and the run's configuration in them.
    """
    file, rest = (Path(argv[0]), argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    preset_name = _option(rest, "--preset")
    base = config_from_file(file, preset_name) if file else config_from_values({}, preset_name)
    names = [field.name for field in dataclasses.fields(RunConfig)]
    defaults = kind(**{name: getattr(base, name) for name in names})
    arguments = parse(kind, rest, default=defaults, prog=prog)
    return arguments, RunConfig(**{name: getattr(arguments, name) for name in names})


def parse(kind: type[T], argv: list[str], *, prog: str, default: T | None = None) -> T:
    """Typed command line: one flag per field, underscores or dashes, help from the docstrings."""
    config = (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff)
    if default is None:
        return tyro.cli(kind, args=argv, prog=prog, config=config)
    return tyro.cli(kind, args=argv, prog=prog, default=default, config=config)


def _option(argv: list[str], name: str) -> str:
    """Value of ``--name value`` or ``--name=value``, needed before the rest can be parsed."""
    for i, word in enumerate(argv):
        if word == name and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(name + "="):
            return word.partition("=")[2]
    return ""


def _dataset_spec(text: str) -> DatasetSpec:
    path, equals, weight = text.rpartition("=")
    if not equals:
        return DatasetSpec(path=text)
    try:
        return DatasetSpec(path=path, weight=float(weight))
    except ValueError:
        raise UserError(f"--dataset {text!r}: the weight after '=' must be a number") from None
