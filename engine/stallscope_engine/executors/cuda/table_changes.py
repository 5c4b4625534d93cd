"""What has changed in the block table since the device heard of it."""

from __future__ import annotations


class TableChanges:
    """Entries of a table of ``width`` blocks a line, kept until a step takes them along."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._entries: list[int] = []
        self._blocks: list[int] = []

    def write(self, line: int, first: int, blocks: list[int]) -> None:
        """Blocks on a line from column ``first`` on."""
        start = line * self._width + first
        self._entries += range(start, start + len(blocks))
        self._blocks += blocks

    def take(self) -> tuple[list[int], list[int]]:
        """Entries of the flattened table that changed since the last call, and the blocks that they became."""
        changes = self._entries, self._blocks
        self._entries, self._blocks = [], []
        return changes
