"""Errors that end a command with one clear line, and the exit codes they carry.

Importing this module is free (standard library only), so every layer may raise these.
"""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """Process exit codes of every ``megalite`` command. 69, 74 and 75 follow BSD's sysexits.h."""

    DONE = 0
    INTERNAL_ERROR = 1
    BAD_INPUT = 2
    DIVERGED = 3
    BROKEN_CONTRACT = 4
    RANK_LOST = 69
    IO_ERROR = 74
    PREEMPTED = 75


class UserError(ValueError):
    """Something the user can mend: the message names the value, the limit and what to do."""

    exit_code = ExitCode.BAD_INPUT


class DivergedError(UserError):
    """Training ran into more consecutive non-finite steps than allowed."""

    exit_code = ExitCode.DIVERGED


class RankLostError(UserError):
    """Another process of the run died, hangs or failed, and this one cannot go on without it."""

    exit_code = ExitCode.RANK_LOST


class StorageError(UserError):
    """A file could not be written or read back as written."""

    exit_code = ExitCode.IO_ERROR
