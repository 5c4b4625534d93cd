"""Which producer a JSON record is of: what the reader asks where a text is no OTLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from stallscope.trace.formats import dynamo, jaeger, tensorrt_llm
from stallscope.trace.formats.records import Converted, Record


class Format(Protocol):
    """A module that reads one producer's records."""

    PRODUCER: str

    def is_mine(self, record: Record) -> bool:
        """Whether the record is of this producer."""
        ...

    def convert(self, record: Record) -> Sequence[Converted]:
        """Its spans, by the process that they are of. Raises one of ``MALFORMED``."""
        ...


_FORMATS: tuple[Format, ...] = (dynamo, tensorrt_llm, jaeger)


def format_of(record: object) -> Format | None:
    """Who reads this record, None if nobody does."""
    return next((one for one in _FORMATS if one.is_mine(record)), None) if isinstance(record, dict) else None


# A finding: kind and text.
EXPERIMENTAL = (
    "experimental_format",
    "checks against a live one were never made: experimental, read by the producer's documents",
)
