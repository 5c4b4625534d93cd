"""What a reader left out or could not match: counted by kind and place, never an exception."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of trouble in one place.

    ``kind`` is a stable word for machines, ``where`` the first place it was seen (file:line, or replica and step),
    ``count`` how often, ``text`` one line for people.
    """

    kind: str
    where: str
    count: int
    text: str

    @property
    def line(self) -> str:
        """For people: what, where first, and how often."""
        return f"{self.text} ({self.where}, {'once' if self.count == 1 else f'{self.count} times'})"


class Findings:
    """Adds up findings of the same kind at the same source (a file or a replica), keeping the first place."""

    def __init__(self, known: Iterable[Finding] = ()) -> None:
        self._found: dict[tuple[str, str], Finding] = {(one.kind, one.where): one for one in known}

    def add(self, kind: str, source: str, at: str, text: str, count: int = 1) -> None:
        """Counts ``count`` more; ``at`` (a line, a step; may be empty) and ``text`` are kept from the first call."""
        if count <= 0:
            return
        key = (kind, source)
        first = self._found.get(key)
        if first is None:
            self._found[key] = Finding(kind, f"{source}{at}", count, text)
        else:
            self._found[key] = Finding(kind, first.where, first.count + count, first.text)

    def all(self) -> tuple[Finding, ...]:
        return tuple(self._found.values())
