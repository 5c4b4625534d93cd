"""Which line of a block table on the device belongs to which running request, and what has changed on it."""

from __future__ import annotations

from dataclasses import dataclass

from stallscope_engine.request import Request
from stallscope_telemetry.records import RequestState


class Lines:
    """Lines 0 to ``lines - 1`` of ``width`` blocks each; entries that changed are kept until they are taken."""

    def __init__(self, lines: int, width: int) -> None:
        self._width = width
        self._free = list(range(lines))
        self._lines: dict[Request, _Line] = {}
        self._changed: list[int] = []
        self._blocks: list[int] = []

    def line_of(self, request: Request) -> int:
        """The request's line, with all of its blocks on it. What stands behind them is old, but in range."""
        line = self._lines.get(request)
        if line is None:
            if not self._free:
                self._reclaim()
            line = self._lines[request] = _Line(self._free.pop())
        if line.preemptions != request.preemptions:
            line.preemptions, line.known = request.preemptions, 0
        blocks = len(request.blocks)
        if blocks > line.known:
            first = line.number * self._width
            self._changed += range(first + line.known, first + blocks)
            self._blocks += request.blocks[line.known :]
            line.known = blocks
        return line.number

    def take_changes(self) -> tuple[list[int], list[int]]:
        """Entries of the flattened table that changed since the last call, and the blocks that they became."""
        changes = self._changed, self._blocks
        self._changed, self._blocks = [], []
        return changes

    def _reclaim(self) -> None:
        """Takes the lines of requests that run no more: nobody tells an executor when they leave.

        A step in flight may still read such a line: the device changes it only after that step.
        """
        for request in [*self._lines]:
            if request.finish_reason is not None or request.state is not RequestState.RUNNING:
                self._free.append(self._lines.pop(request).number)


@dataclass(slots=True)
class _Line:
    number: int
    known: int = 0  # blocks written
    preemptions: int = 0  # of the request, when they were written
