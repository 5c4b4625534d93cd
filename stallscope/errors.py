"""Errors that a user can mend: one line that says what, where and what to do, and an exit code."""

from __future__ import annotations


class StallscopeError(Exception):
    """Base of all errors printed without a traceback; ``exit_code`` is the process's."""

    exit_code = 1


class UsageError(StallscopeError):
    """Wrong use, or nothing sound to read."""

    exit_code = 2


class InconclusiveError(StallscopeError):
    """What was asked can't be answered from this data."""

    exit_code = 4
