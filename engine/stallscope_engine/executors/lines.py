"""Which line of an executor's block table belongs to which running request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stallscope_engine.request import Request
from stallscope_telemetry.records import RequestState


class Lines:
    """Lines 0 to ``lines - 1``; ``write(line, first, blocks)`` puts blocks on a line from column ``first`` on."""

    def __init__(self, lines: int, write: Callable[[int, int, list[int]], None]) -> None:
        self._write = write
        self._free = list(range(lines))
        self._lines: dict[Request, _Line] = {}

    def line_of(self, request: Request) -> int:
        """The request's line, with all of its blocks on it. What stands behind them is old, but in range."""
        line = self._lines.get(request)
        if line is None:
            if not self._free:
                self._reclaim()
            line = self._lines[request] = _Line(self._free.pop())
        if line.preemptions != request.preemptions:
            line.preemptions, line.known = request.preemptions, 0
        if len(request.blocks) > line.known:
            self._write(line.number, line.known, request.blocks[line.known :])
            line.known = len(request.blocks)
        return line.number

    def _reclaim(self) -> None:
        """Takes the lines of requests that run no more: nobody tells an executor when they leave.

        A step in flight may still read such a line: a device changes it only after that step.
        """
        for request in [*self._lines]:
            if request.finish_reason is not None or request.state is not RequestState.RUNNING:
                self._free.append(self._lines.pop(request).number)


@dataclass(slots=True)
class _Line:
    number: int
    known: int = 0  # blocks written
    preemptions: int = 0  # of the request, when they were written
