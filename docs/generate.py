"""Writes the pages of ``docs/`` that are made from code (``make docs``); a test compares them with what is there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from stallscope_telemetry.names import ATTRIBUTES, CLIENT_SPAN, GPU_SPAN, REQUEST_SPAN, SCOPE, STEP_SPAN

FOLDER = Path(__file__).parent
HEADINGS = {
    "resource": "Resource: what a replica is",
    "step": f"Span `{STEP_SPAN}`: one engine iteration",
    "request": f"Span `{REQUEST_SPAN}`: one request",
    "gpu": f"Span `{GPU_SPAN}`: what a GPU said at one time",
    "client": f"Span `{CLIENT_SPAN}`: one request as its client saw it, the parent of its `{REQUEST_SPAN}`",
}
NOTES = {
    "client": (
        f"It carries of `{REQUEST_SPAN}`'s attributes, under the same names: id, tenant, priority, session, "
        "predecessor, retry_of, usage, max_tokens and token_times (from the sending on); and these:"
    )
}


def telemetry_page() -> str:
    """The telemetry contract: a table of attributes for the resource and for each kind of span, in Markdown."""
    return "\n".join(_telemetry_lines()) + "\n"


def _telemetry_lines() -> Iterator[str]:
    yield "# The telemetry contract: attributes"
    yield ""
    yield "Written by `make docs` from `telemetry/stallscope_telemetry/names.py`; edit that."
    yield f"Spans are of the instrumentation scope `{SCOPE}`."
    for on, heading in HEADINGS.items():
        yield from ("", f"## {heading}", "")
        if on in NOTES:
            yield from (NOTES[on], "")
        yield from ("| attribute | type | unit | meaning |", "| --- | --- | --- | --- |")
        for attribute in ATTRIBUTES:
            if attribute.on == on:
                yield f"| `{attribute.name}` | {attribute.type} | {attribute.unit} | {attribute.about} |"


PAGES = {"telemetry.md": telemetry_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
