"""``megalite COMMAND``: finds the command's file, runs it, and turns errors into one line and an exit code."""

from __future__ import annotations

import importlib
import sys
import traceback

from megalite import __version__
from megalite.errors import ExitCode, UserError

COMMANDS = {
    "data": ("megalite.cli.data", "prepare text for training, inspect it, name the documents of a step"),
    "pretrain": (
        "megalite.cli.pretrain",
        "pre-train a base model, or continue a run from its newest checkpoint",
    ),
    "plan": (
        "megalite.cli.plan",
        "what a configuration means on N processes: layout, idle time, traffic, memory",
    ),
    "bench": (
        "megalite.cli.bench",
        "how fast a run trains here, and where its time goes: peak to MFU, part by part",
    ),
    "replay": (
        "megalite.cli.replay",
        "repeat one step of a run and name the first thing in it that is not finite",
    ),
    "verify": ("megalite.cli.verify", "prove that every parallel layout computes what one process computes"),
    "sample": ("megalite.cli.sample", "generate text from a checkpoint"),
    "report": ("megalite.cli.report", "one HTML page about a run: charts, samples, is pre-training helping"),
    "doctor": ("megalite.cli.doctor", "check every kernel on this machine, and how fast it is"),
    "export": ("megalite.cli.export", "write a checkpoint as a Hugging Face folder"),
    "import": ("megalite.cli.import_", "check a Hugging Face folder and make it one to train from"),
}
"""Command → its module (imported only when it runs, so that help is instant) and what it does."""

EXIT_CODES = """exit codes:
  0   done
  1   internal error (a traceback says where)
  2   bad input, configuration or arguments
  3   diverged: too many consecutive non-finite steps
  4   broken contract: a kernel is not as accurate as it promises, or a layout differs from one process
  69  a rank was lost: another process of the run died, hangs or failed; start the run again
  74  input/output error: disk full, not writable, damaged file
  75  preempted: a checkpoint was saved, run the same command again"""


def main(argv: list[str]) -> int:
    """Run one command; returns the process's exit code."""
    if argv in (["--version"], ["-V"]):
        print(f"megalite {__version__}")
        return ExitCode.DONE
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return ExitCode.DONE if argv else ExitCode.BAD_INPUT
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        print(f"megalite: error: unknown command {name!r}; commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return ExitCode.BAD_INPUT
    try:
        code: int = importlib.import_module(COMMANDS[name][0]).main(rest)
        return code
    except UserError as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:
        return _fail(_describe(error), ExitCode.IO_ERROR)
    except KeyboardInterrupt:
        return _fail("interrupted", ExitCode.PREEMPTED)
    except SystemExit as stop:  # the argument parser: help (0) or wrong arguments (2)
        return stop.code if isinstance(stop.code, int) else ExitCode.BAD_INPUT
    except Exception:
        traceback.print_exc()
        return ExitCode.INTERNAL_ERROR


def entry() -> None:
    """Console script."""
    sys.exit(main(sys.argv[1:]))


def _fail(message: str, code: int) -> int:
    print(f"megalite: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _describe(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}"


def _overview() -> str:
    lines = ["usage: megalite COMMAND [options]     (megalite COMMAND --help says more)", "", "commands:"]
    lines += [f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join([*lines, "", EXIT_CODES])
