"""Writes the pages of ``docs/`` that are made from code (``make docs``); a test compares them with what is there."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import io
import tokenize
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Union, get_args, get_origin, get_type_hints

from stallscope.diagnosis import model
from stallscope.watch import families
from stallscope.watch.scores import LEAST_SERIES, LIKELY, POSSIBLE
from stallscope_telemetry.names import ATTRIBUTES, CLIENT_SPAN, GPU_SPAN, REQUEST_SPAN, SCOPE, STEP_SPAN

FOLDER = Path(__file__).parent
HEADINGS = {
    "resource": "Resource: what a replica is",
    "step": f"Span `{STEP_SPAN}`: one engine iteration",
    "request": f"Span `{REQUEST_SPAN}`: one request",
    "gpu": f"Span `{GPU_SPAN}`: what a GPU said at one time",
    "client": f"Span `{CLIENT_SPAN}`: one request as its client saw it, the parent of its `{REQUEST_SPAN}`",
    "converted": "Spans that `stallscope convert` has written",
}
NOTES = {
    "client": (
        f"It carries of `{REQUEST_SPAN}`'s attributes, under the same names: id, tenant, priority, session, "
        "predecessor, retry_of, usage, max_tokens and token_times (from the sending on); and these:"
    ),
    "converted": (
        f"There is an `{REQUEST_SPAN}` span for every request of the trace that was converted, also for those that had "
        "not ended. It leaves out what is not known, and nothing else:"
    ),
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


# --- the diagnosis ------------------------------------------------------------------------------------------------


def diagnosis_page() -> str:
    """The schema of a diagnosis as JSON: a table of fields for each object, in the order in which they are met."""
    return "\n".join(_diagnosis_lines()) + "\n"


def _diagnosis_lines() -> Iterator[str]:
    yield f"# The diagnosis as JSON: schema version {model.SCHEMA_VERSION}"
    yield ""
    yield "Written by `make docs` from `stallscope/diagnosis/model.py`; edit that."
    yield "It is what `stallscope analyze TRACE --format json` prints, and what `--save` keeps."
    yield "Times (`_ns`) are integers, ns since the epoch, amounts of time (`_s`) seconds, shares numbers in 0..1."
    yield "Readers must look at `schema_version`: it is raised with every change of what is below."
    for kind in _kinds(model.Diagnosis):
        yield from ("", f"## {kind.__name__}", "", *_prose(kind))
        comments = _comments(kind)
        if issubclass(kind, enum.Enum):
            yield from ("| value | meaning |", "| --- | --- |")
            yield from (f"| `{member.value}` | {_cell(comments.get(member.name, ''))} |" for member in kind)
        else:
            yield from ("| field | type | remark |", "| --- | --- | --- |")
            for name, hint in get_type_hints(kind).items():
                yield f"| `{name}` | {_type(hint)} | {_cell(comments.get(name, ''))} |"


def _kinds(kind: type) -> list[type]:
    """The dataclasses and enumerations that a dataclass is made of, itself first, each once."""
    found = [kind]
    for hint in get_type_hints(kind).values() if dataclasses.is_dataclass(kind) else ():
        for part in (hint, *get_args(hint)):
            if isinstance(part, type) and (dataclasses.is_dataclass(part) or issubclass(part, enum.Enum)):
                found += _kinds(part)
    return list(dict.fromkeys(found))


def _type(hint: object) -> str:
    if get_origin(hint) is tuple:
        return f"list of {_type(get_args(hint)[0])}"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _type(part) for part in get_args(hint))
    names = {str: "string", int: "integer", float: "number", bool: "boolean"}
    if not isinstance(hint, type):
        raise TypeError(hint)
    return names.get(hint) or f"[{hint.__name__}](#{hint.__name__.lower()})"


def _prose(kind: type) -> list[str]:
    """The class's own docstring as Markdown."""
    text = inspect.cleandoc(kind.__dict__.get("__doc__") or "").replace("``", "`")
    return [*text.splitlines(), ""] if text else []


def _comments(kind: type) -> dict[str, str]:
    """What the comment behind each field says."""
    found: dict[str, str] = {}
    source = inspect.cleandoc(inspect.getsource(kind))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        before = token.line[: token.start[1]].split()
        if token.type == tokenize.COMMENT and before:
            found[before[0].rstrip(":")] = token.string.lstrip("# ")
    return found


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# --- the metrics --------------------------------------------------------------------------------------------------

_BEGINS = {
    families.BLAME: "Who stalls whom",
    families.TTFT: "Tenants",
    families.STEPS: "Replicas",
    families.LAG: "The watch itself",
}
_METRICS = f"""
`GET /metrics` at the collector's HTTP port has them for Prometheus: OpenMetrics 1.0, or the text format before it for
who asks for that. `stallscope collect --metrics-to http://127.0.0.1:4318/v1/metrics` pushes the same as OTLP metrics
every {families.SCRAPE_S} s, under the same names.

- **Tenants** are as the telemetry names them. `{families.OTHER}` is all those without series of their own, `(unknown)`
  those whom nothing names.
- **Counters begin at zero and never fall** while the collector runs; a restart is a fall to zero. A series shows zero
  until every scraper that comes regularly has seen it so, and only then what came for it meanwhile: so `rate()` sees a
  first offence. Where nobody scrapes, that waits for 30 s.
- **Pairs** of victim and culprit are at zero from the time on at which a tenant first comes to a replica, for
  {", ".join(f"`{mechanism}`" for mechanism in LIKELY)}, and while pairs are few for
  {", ".join(f"`{mechanism}`" for mechanism in POSSIBLE)}. For others, blame shows a scrape later.
- **Budget**: at most 20,000 series (`--max-series`, at least {LEAST_SERIES}), each bucket, sum and count of a
  histogram one. Tenants, replicas and pairs are each sure of a share. Who has no room is `{families.OTHER}`, the sum of
  all such (of coverage and of the last span the least, of the oldest wait the most), and counted by
  `{families.FOLDED.name}`. A culprit that is blamed gets a series at once, by taking the room of a pair that is still
  at zero. A tenant that costs more, in step time and blame, takes the place of the cheapest one, but not within two
  hours. A series that leaves keeps its value, and goes on from it when it returns.
- **Names** of more than 1,024 bytes are cut and end in a digest; what is no Unicode text shows as an escape.
- `_created` has the time of the start, on counters without labels only: Prometheus keeps each as one more series.
"""


def metrics_page() -> str:
    """Every metric in a table, by what it is of, in Markdown."""
    return "\n".join(_metrics_lines()) + "\n"


def _metrics_lines() -> Iterator[str]:
    yield "# Metrics"
    yield ""
    yield "Written by `make docs` from `stallscope/watch/families.py`; edit that."
    yield _METRICS.rstrip("\n")
    for family in families.FAMILIES:
        if family in _BEGINS:
            yield from ("", f"## {_BEGINS[family]}", "")
            yield from ("| metric | kind | labels | unit | meaning |", "| --- | --- | --- | --- | --- |")
        labels = ", ".join(f"`{label}`" for label in family.labels)
        yield f"| `{family.name}` | {family.kind} | {labels} | {family.unit} | {_cell(family.help)} |"
    yield from ("", "## Buckets", "", "Upper bounds in seconds; those of SLOs are added.", "")
    for name, bounds in families.BUCKETS.items():
        yield f"- `{name}`: {', '.join(f'{bound:g}' for bound in bounds)}"


PAGES = {"telemetry.md": telemetry_page, "diagnosis.md": diagnosis_page, "metrics.md": metrics_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
