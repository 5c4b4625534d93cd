"""A span, whatever form of OTLP it came in, and the process that sent it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

Value = int | str | bool | float | list[int] | list[str]
Attributes = dict[str, Value]

# What an untrusted document may raise while it is taken apart as if it were well formed.
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, OverflowError, IndexError)


@dataclass(eq=False, slots=True)
class Resource:
    """The process that sent spans; one object for all that have the same attributes."""

    attributes: Attributes


# Names are some hundred characters, lists of token times some hundred thousand. All that is longer would be held until
# the file is read, of each of its spans.
MOST_NAME, MOST_LIST = 1 << 14, 1 << 24


def is_short(value: Value, most: int = MOST_NAME) -> bool:
    """Whether it is no text of more characters, nor has such."""
    if isinstance(value, str):
        return len(value) <= most
    if isinstance(value, list) and value and isinstance(value[0], str):
        return all(len(one) <= most for one in value if isinstance(one, str))
    return True


class Resources:
    """Those seen so far, in all files."""

    def __init__(self) -> None:
        self._by_bytes: dict[bytes, Resource] = {}
        self._by_content: dict[str, Resource] = {}

    def __len__(self) -> int:
        return len(self._by_content)

    def get(self, raw: bytes, read: Callable[[], Attributes]) -> Resource:
        """The resource that was encoded as ``raw``; ``read`` takes it apart the first time."""
        key = raw if len(raw) <= MOST_NAME else hashlib.blake2b(raw).digest()
        known = self._by_bytes.get(key)
        if known is None:
            attributes = {name: value for name, value in read().items() if is_short(value)}
            content = repr(sorted(attributes.items()))
            known = self._by_bytes[key] = self._by_content.setdefault(content, Resource(attributes))
        return known


class Span(msgspec.Struct, gc=False, eq=False):
    """What is read of a span: times in ns since the epoch, ids in lower-case hex.

    ``bad``: attributes that were left out, since their values are nothing that OTLP allows here.
    """

    name: str
    trace_id: str
    trace_state: str
    start: int
    end: int
    attributes: Attributes
    bad: int = 0


@dataclass(frozen=True, slots=True)
class SpanGroup:
    """Spans that came together from one resource. ``source`` is the file, ``at`` the place in it (":4", " message 4").

    ``malformed``: how many more there were, without sound name, times or attributes.
    """

    resource: Resource
    spans: list[Span]
    source: str
    at: str
    malformed: int = 0
