"""Numbers for prompts that begin alike, so that telemetry can tell which do without a word of what they say."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

_MOST_KNOWN = 16_384  # beginnings; the one that was not met for longest is forgotten first


class PrefixGroups:
    """Groups by the first full block: nothing shorter can be found in the prefix cache."""

    def __init__(self) -> None:
        self._numbers: OrderedDict[bytes, int] = OrderedDict()
        self._last = 0

    def number(self, block_hashes: Sequence[bytes]) -> int:
        """The group of a request with these blocks, from 1 on; 0 where it has no full block, or they have no names."""
        if not block_hashes:
            return 0
        first = block_hashes[0]
        number = self._numbers.get(first)
        if number is None:
            self._last += 1
            number = self._numbers[first] = self._last
            if len(self._numbers) > _MOST_KNOWN:
                self._numbers.popitem(last=False)
        else:
            self._numbers.move_to_end(first)
        return number
