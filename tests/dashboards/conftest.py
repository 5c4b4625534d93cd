"""Traces and the command line, for a dashboard's answers to be held against."""

from __future__ import annotations

from tests.cli.conftest import run, trace
from tests.fleet.conftest import dataset, hourly

__all__ = ["dataset", "hourly", "run", "trace"]
