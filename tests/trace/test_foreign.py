"""Others' tables: every form gives the same columns, what is damaged is counted, what is no table is said."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from stallscope.errors import UsageError
from stallscope.trace import foreign
from stallscope.trace.findings import Finding, Findings
from stallscope.trace.foreign import ForeignTable, read_foreign
from tests.trace.recording import folder

ROWS = [
    {"X-Request-Id": "a-1", "consumer": {"username": "chat"}, "size": 12, "share": 0.5},
    {"X-Request-Id": "a-2", "consumer": {"username": 'b"at,\nch'}, "size": 13, "share": None},
    {"X-Request-Id": "a-3", "consumer": None, "size": None, "share": 0.25},
]
WANTED = ("x_request_id", "consumer.username", "size", "share", "nowhere")
FOUND = {
    "x_request_id": ["a-1", "a-2", "a-3"],
    "consumer.username": ["chat", 'b"at,\nch', None],
    "size": ["12", "13", None],
    "share": ["0.5", None, "0.25"],
}


def as_csv() -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(ROWS[0])
    writer.writerows([json.dumps(one) if isinstance(one, dict) else one for one in row.values()] for row in ROWS)
    return text.getvalue().encode()


def as_json_lines() -> bytes:
    return b"\n".join(json.dumps(row).encode() for row in ROWS)


def as_parquet() -> bytes:
    out = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(ROWS), out)
    return out.getvalue()


def unpacked(content: bytes) -> bytes:
    return content


def read(path: Path, content: bytes, wanted: tuple[str, ...] = WANTED) -> tuple[ForeignTable, tuple[Finding, ...]]:
    path.write_bytes(content)
    findings = Findings()
    return read_foreign(path, wanted, findings), findings.all()


def as_lists(table: ForeignTable) -> dict[str, list[str | None]]:
    return {name: column.to_pylist() for name, column in table.columns.items()}


@pytest.mark.parametrize("pack", [unpacked, gzip.compress, zstandard.compress])
@pytest.mark.parametrize("made", [as_csv, as_json_lines, as_parquet, lambda: json.dumps(ROWS).encode()])
def test_a_table_reads_the_same_whatever_it_is_written_as(
    tmp_path: Path, made: Callable[[], bytes], pack: Callable[[bytes], bytes]
) -> None:
    table, findings = read(tmp_path / "any.name", pack(made()))
    assert as_lists(table) == FOUND
    assert findings == ()


def test_json_in_a_cell_is_looked_into_where_something_in_it_is_wanted(tmp_path: Path) -> None:
    content = b'id,metadata\n1,"{""team"": {""name"": ""chat""}}"\n2,not json\n3,\n'
    table, _ = read(tmp_path / "t.csv", content, ("id", "metadata.team.name"))
    assert as_lists(table) == {"id": ["1", "2", "3"], "metadata.team.name": ["chat", None, None]}


def test_keys_with_dots_are_found_as_they_are_written(tmp_path: Path) -> None:
    content = b'{"consumer.username": "a"}\n{"consumer": {"username": "b"}}\n'
    table, _ = read(tmp_path / "t.jsonl", content, ("consumer.username",))
    assert as_lists(table) == {"consumer.username": ["a", "b"]}


def test_a_mark_of_utf_8_before_the_content_is_no_part_of_a_name(tmp_path: Path) -> None:
    table, _ = read(tmp_path / "t.csv", b"\xef\xbb\xbfid,x\n1,2\n", ("id",))
    assert as_lists(table) == {"id": ["1"]}
    table, _ = read(tmp_path / "t.jsonl", b'\xef\xbb\xbf{"id": "1"}\n', ("id",))
    assert as_lists(table) == {"id": ["1"]}


def test_lines_that_are_no_objects_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    content = b'{"id": "1"}\n{"id": "2"\n[3]\n\n\xff\xfe\n{"id": "6"}\n{"id": "7'
    table, (finding,) = read(tmp_path / "t.jsonl", content, ("id",))
    assert as_lists(table) == {"id": ["1", "6"]}
    assert table.rows.to_pylist() == [1, 6]
    assert (finding.kind, finding.where, finding.count) == ("unreadable_row", f"{tmp_path / 't.jsonl'}:2", 4)


def test_csv_rows_of_another_length_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    table, (finding,) = read(tmp_path / "t.csv", b"id,x\n1,2\n2\n3,4,5\n4,6\n", ("id",))
    assert as_lists(table) == {"id": ["1", "4"]}
    assert (finding.kind, finding.where, finding.count) == ("unreadable_row", f"{tmp_path / 't.csv'}:3", 2)


def test_text_that_is_not_utf_8_is_kept_as_far_as_it_is(tmp_path: Path) -> None:
    table, _ = read(tmp_path / "t.csv", b"id,x\n\xffa,1\n", ("id",))
    assert as_lists(table) == {"id": ["\ufffda"]}


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_what_came_before_the_damage_of_a_packed_file_is_used(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    lines = b"".join(b'{"id": "%d", "noise": "%x"}\n' % (n, hash((n, "noise"))) for n in range(50_000))
    table, findings = read(tmp_path / "t.jsonl.gz", pack(lines)[:-20_000], ("id",))
    read_rows = as_lists(table)["id"]
    assert 1_000 < len(read_rows) < 50_000
    assert read_rows == [str(n) for n in range(len(read_rows))]
    assert findings


def test_a_line_without_an_end_takes_no_more_memory_than_a_row_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign, "MOST_ROW_BYTES", 1000)
    monkeypatch.setattr(foreign, "_CHUNK_BYTES", 100)
    content = b'{"id": "1"}\n{"id": "' + b"x" * 12_345 + b'"}\n{"id": "3"}\n'
    table, (finding,) = read(tmp_path / "t.jsonl", content, ("id",))
    assert as_lists(table) == {"id": ["1", "3"]}
    assert (finding.where, finding.count) == (f"{tmp_path / 't.jsonl'}:2", 1)
    assert table.rows.to_pylist() == [1, 3]


def test_values_are_bounded(tmp_path: Path) -> None:
    for content in (b'{"id": "%s"}' % (b"x" * 100_000), b"id\n%s\n" % (b"x" * 100_000)):
        table, _ = read(tmp_path / "t", content, ("id",))
        assert as_lists(table) == {"id": ["x" * foreign.MOST_TEXT]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (b" \n\n", "the file is empty"),
        (b"id,x\n", "no row in it"),
        (b"\x00\x01\x02garbage" * 50, "neither text nor Parquet"),
        (b"PAR1garbage", "not readable as Parquet"),
        (b"[1, 2", "cannot be read"),
        (b"{]\n{]\n", "no row in it"),
        (b"\x1f\x8bgarbage", "cannot be read"),
        (b"\x28\xb5\x2f\xfdgarbage", "cannot be read"),
    ],
)
def test_what_is_no_table_is_one_line_that_names_the_file(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(UsageError) as raised:
        read(tmp_path / "t.csv", content)
    assert says in str(raised.value)
    assert str(tmp_path / "t.csv") in str(raised.value)
    assert "\n" not in str(raised.value)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([as_csv, as_json_lines, as_parquet]),
    st.sampled_from([unpacked, gzip.compress, zstandard.compress]),
    st.floats(0, 1),
    st.binary(max_size=40),
    st.integers(0, 40),
)
def test_damage_anywhere_costs_rows_or_is_a_users_mistake(
    made: Callable[[], bytes], pack: Callable[[bytes], bytes], where: float, instead: bytes, cut: int
) -> None:
    content = pack(made())
    at = int(where * len(content))
    with folder() as path:
        try:
            table, _ = read(path / "t", content[:at] + instead + content[at + cut :])
        except UsageError:
            return
        assert {len(column) for column in table.columns.values()} <= {len(table.rows)}


def test_a_header_that_is_no_csv_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the header can't be read as CSV"):
        read(tmp_path / "t.csv", b"id,x\rmore\n1,2\n")


def test_csv_rows_that_are_neither_utf_8_nor_of_the_right_length_are_counted(tmp_path: Path) -> None:
    table, (finding,) = read(tmp_path / "t.csv", b"id,x\n\xff\xfe\n1,2\n", ("id",))
    assert as_lists(table) == {"id": ["1"]}
    assert (finding.kind, finding.count) == ("unreadable_row", 1)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.csv: cannot be read"):
        read_foreign(tmp_path / "nowhere.csv", WANTED, Findings())
