"""A tenant that calls itself as nobody is called is told apart from nobody, however its name comes."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import zstandard

from stallscope.diagnosis import diagnose
from stallscope.trace import read_trace
from stallscope.trace.plain_spans import claimed_tenant
from stallscope.trace.reserved import UNKNOWN, tenant_name
from stallscope.trace.tenants import tenant_names

STALL = Path(__file__).parents[2] / "sample_traces" / "stall.otlp.jsonl.zst"


@pytest.mark.parametrize(
    ("told", "known"),
    [("(other)", "tenant (other)"), ("()", "tenant ()"), ("(a", "(a"), ("a)", "a)"), ("", ""), (UNKNOWN, UNKNOWN)],
)
def test_names_in_parentheses_are_ours(told: str, known: str) -> None:
    assert tenant_name(told) == known
    assert claimed_tenant({"enduser.id": told}, "")[0] == known
    column = pa.chunked_array([[told]], pa.string())
    assert tenant_names(column).to_pylist() == [known if known not in ("", UNKNOWN) else None]


@pytest.mark.parametrize("name", ["(other)", "(engine)", "(others)"])
def test_who_calls_itself_as_nobody_is_called_is_blamed_all_the_same(tmp_path: Path, name: str) -> None:
    text = zstandard.ZstdDecompressor().stream_reader(STALL.open("rb")).read().decode()
    trace = tmp_path / "stall.otlp.jsonl"
    trace.write_text(text.replace('"reasoner"', f'"{name}"'), encoding="utf-8")
    (incident,) = diagnose(read_trace(trace), replay=False).incidents
    assert [culprit.tenant for culprit in incident.culprits] == [f"tenant {name}"]
