"""Reading: compression, wrong input, damaged input. Either one line of advice or a trace of the declared schemas."""

import gzip
import random
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import orjson
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from stallscope.errors import UsageError
from stallscope.trace import Trace, read_trace, write_parquet
from stallscope.trace.schema import TABLES
from stallscope_engine.config import EngineConfig
from stallscope_telemetry.emitter import Emitter
from stallscope_telemetry.files import OtlpFileExporter
from stallscope_telemetry.spans import EngineDescription, resource_attributes
from tests.trace.recording import Arrival, Recording, Workload, as_batches, folder, line, read, run, steady, write


@cache
def busy() -> Recording:
    """Prefill chunks, waits, preemptions and an abort in some forty steps."""
    config = EngineConfig(max_num_seqs=3, max_num_batched_tokens=16, block_size=4, kv_blocks=15)
    arrivals = [Arrival(2_000_000, 10 + 7 * (n % 3), 12, f"t{n % 2}", 9 if n == 4 else None) for n in range(7)]
    recording = run(Workload(config, arrivals, 8, 10_000))
    assert any(one.preempted for one in recording.steps)
    assert any(reason == 2 for one in recording.steps for _, reason in one.left)
    return recording


def plain(lines: list[bytes]) -> bytes:
    return b"\n".join(lines) + b"\n"


def kinds(trace: Trace) -> dict[str, int]:
    return {finding.kind: finding.count for finding in trace.findings}


def framed_zstd(data: bytes) -> bytes:
    half = len(data) // 2
    return zstandard.compress(data[:half]) + zstandard.compress(data[half:])


def members_gzip(data: bytes) -> bytes:
    half = len(data) // 2
    return gzip.compress(data[:half]) + gzip.compress(data[half:])


# --- compression --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [bytes, gzip.compress, members_gzip, zstandard.compress, framed_zstd])
@pytest.mark.parametrize("name", ["t.otlp.jsonl", "t.otlp.jsonl.gz", "anything"])
def test_compression_is_seen_in_the_bytes_whatever_the_name(
    compress: Callable[[bytes], bytes], name: str, tmp_path: Path
) -> None:
    lines = busy().lines()
    (tmp_path / name).write_bytes(compress(plain(lines)))
    assert read_trace(tmp_path / name).tables == read(lines).tables


def test_progress_ends_with_all_bytes_read(tmp_path: Path) -> None:
    path = write(tmp_path / "t.otlp.jsonl", busy().lines())
    seen: list[tuple[int, int]] = []
    read_trace(path, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (path.stat().st_size, path.stat().st_size)


@pytest.mark.parametrize("suffix", [".otlp.jsonl", ".otlp.jsonl.gz", ".otlp.jsonl.zst"])
def test_what_the_exporter_writes_is_what_was_recorded(suffix: str, tmp_path: Path) -> None:
    recording, config = busy(), busy().config
    description = EngineDescription(
        replica="r0",
        model=config.model,
        engine_version="1",
        executor="virtual",
        block_size=config.block_size,
        total_blocks=config.kv_blocks,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        chunked_prefill=config.chunked_prefill,
    )
    exporter = OtlpFileExporter(tmp_path / f"t{suffix}")
    with Emitter(resource_attributes(description), [exporter], random.Random(1), background=False) as emitter:
        for record in recording.steps:
            emitter.step(record)
        for ended in recording.ended:
            emitter.request(ended)
    trace = read_trace(tmp_path)
    assert as_batches(trace) == recording.truth
    assert trace.findings == ()
    assert trace.validate() == []
    (replica,) = trace.replicas.to_pylist()
    assert (replica["max_num_seqs"], replica["executor"], replica["prefix_caching"]) == (3, "virtual", False)


# --- wrong input --------------------------------------------------------------------------------------------


def test_wrong_input_gets_one_line_of_advice(tmp_path: Path) -> None:
    (tmp_path / "empty.otlp.jsonl").touch()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 10)
    (tmp_path / "broken.gz").write_bytes(b"\x1f\x8b" + b"no gzip at all")
    (tmp_path / "other.json").write_bytes(b'{"spans": []}\n[1, 2]\n"text"\n')
    untold = [text.replace(b'"stallscope.scheduled"', b'"other"') for text in busy().request_lines()]
    write(tmp_path / "requests.otlp.jsonl", untold)
    timeless = [text.replace(b'"startTimeUnixNano":"1', b'"startTimeUnixNano":"-') for text in busy().step_lines()]
    write(tmp_path / "timeless.otlp.jsonl", timeless)
    for name, says in {
        "missing": "no such file or folder",
        "empty.otlp.jsonl": "is empty",
        "nothing": "no trace file in this folder",
        "picture.png": "no OTLP in it",
        "broken.gz": "no OTLP in it",
        "other.json": "no OTLP in it",
        "requests.otlp.jsonl": "has 7 request spans, no engine.step spans, and nothing that says when",
        "timeless.otlp.jsonl": "engine.step spans has sound times",
    }.items():
        with pytest.raises(UsageError, match=says) as raised:
            read_trace(tmp_path / name)
        assert str(raised.value).startswith(str(tmp_path / name))
        assert "\n" not in str(raised.value)


# --- damaged input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [members_gzip, framed_zstd])
def test_truncated_compressed_file_gives_what_came_before(compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    compressed = compress(plain(busy().lines()))
    (tmp_path / "torn").write_bytes(compressed[:-10])
    trace = read_trace(tmp_path / "torn")
    assert kinds(trace)["damaged_file"] == 1
    assert 0 < trace.steps.num_rows <= len(busy().steps)
    (tmp_path / "bad").write_bytes(compressed[: len(compressed) * 3 // 4] + b"?" * 100)
    assert kinds(read_trace(tmp_path / "bad"))["damaged_file"] == 1


def test_garbage_lines_are_counted_at_their_place() -> None:
    lines = busy().lines()
    trace = read([*lines[:3], b"garbage", b"{}", *lines[3:-1], lines[-1][:40]])
    (finding,) = trace.findings
    assert (finding.kind, finding.count) == ("unreadable_line", 3)
    assert finding.where.endswith("t.otlp.jsonl:4")


def test_foreign_spans_are_ignored_and_counted() -> None:
    foreign = [line("other", busy().config, "GET /", 1, 2, {})] * 3
    trace = read([*foreign, *busy().lines()])
    assert kinds(trace) == {"foreign_spans": 3}
    assert trace.tables == read(busy().lines()).tables


def test_a_step_that_came_twice_counts_once_and_a_conflict_is_told() -> None:
    lines = busy().lines()
    twin = lines[5].replace(
        b'"stallscope.kv.used","value":{"intValue":"', b'"stallscope.kv.used","value":{"intValue":"1'
    )
    assert twin != lines[5]
    trace = read([*lines, lines[4], twin])
    assert kinds(trace) == {"duplicate_step": 1, "conflicting_step": 1}
    assert trace.tables == read(lines).tables


def replaced(lines: list[bytes], position: int, pattern: bytes, by: bytes) -> list[bytes]:
    changed, count = re.subn(pattern, by, lines[position], count=1)
    assert count == 1
    return [*lines[:position], changed, *lines[position + 1 :]]


@pytest.mark.parametrize(
    ("pattern", "by", "kind"),
    [
        (rb'(stallscope.prefill",.*?intValue":")\d+', rb"\g<1>999", "unknown_handle"),
        (rb'(stallscope.prefill",.*?intValue":)"\d+"', rb"\g<1>[]", "unsound_attribute"),
        (rb'(stallscope.prefill",.*?)\{"intValue":"\d+"\},', rb"\g<1>", "unsound_attribute"),
        (rb'(stallscope.request.max_tokens",.*?)\{"intValue":"\d+"\},', rb"\g<1>", "unsound_attribute"),
        (rb'(stallscope.request.tenant",.*?)stringValue', rb"\g<1>boolValue", "unsound_attribute"),
        (rb'(stallscope.request.id",.*?)\{"stringValue":"[^"]+"\},', rb"\g<1>", "unsound_join"),
        (rb'(stallscope.wait",.*?intValue":"\d+"\},\{"intValue":")\d+', rb"\g<1>77", "unknown_wait_reason"),
        (rb'(stallscope.left",.*?intValue":"\d+"\},\{"intValue":")\d+', rb"\g<1>77", "unknown_finish_reason"),
        (rb'(kv.used","value":\{"intValue":")\d+', rb"\g<1>99999999999999999999", "unsound_value"),
        (rb'(batch_size","value":\{)"intValue":"\d+"', rb'\1"stringValue":"x"', "unsound_value"),
        (rb'(engine.step","startTimeUnixNano":")\d+', rb"\g<1>77777777777777777777777", "unsound_step"),
        (rb'(engine.step","startTimeUnixNano":")\d+', rb"\g<1>x", "malformed_span"),
        (rb'(endTimeUnixNano":")\d+', rb"\g<1>17", "step_times"),
        (rb'("key":"stallscope.step.)sched"', rb'\1shed"', "unsound_attribute"),
        (rb'(token_times","value":\{"stringValue":")', rb"\g<1>-", "unsound_value"),
        (rb'(stallscope.request.computed_tokens".*?intValue":")\d+', rb"\g<1>4", "keyframe_differs"),
    ],
)
def test_damage_is_told_by_kind_and_the_rest_is_used(pattern: bytes, by: bytes, kind: str) -> None:
    lines = busy().lines()
    first = next(position for position, text in enumerate(lines) if re.search(pattern, text))
    trace = read(replaced(lines, first, pattern, by))
    assert kinds(trace)[kind] >= 1
    assert trace.steps.num_rows >= len(busy().steps) - 1


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    """The busy recording's file, damaged in one to four ways."""
    lines = busy().lines()
    dice = random.Random(draw(st.integers(0, 2**32)))
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["drop", "repeat", "shuffle", "attribute", "value", "flip"]))
        at = dice.randrange(len(lines))
        if kind == "drop" and len(lines) > 1:
            del lines[at]
        elif kind == "repeat":
            lines.insert(dice.randrange(len(lines)), lines[at])
        elif kind == "shuffle":
            dice.shuffle(lines)
        elif kind == "flip":
            damaged = bytearray(lines[at] or b"x")
            for _ in range(dice.randint(1, 3)):
                damaged[dice.randrange(len(damaged))] = dice.choice([0, 10, 34, 44, 45, 57, 91, 123, 255])
            lines[at] = bytes(damaged)
        else:
            lines[at] = rewrite(lines[at], kind, dice, draw(VALUES))
    data = plain(lines)
    return data[: dice.randrange(len(data))] if draw(st.integers(0, 5)) == 0 else data


NUMBERS = st.sampled_from(["-1", "0", "1", "5", "7", "x", "", "2147483647", "9007199254740991", "9" * 19, "9" * 400])
VALUES = st.one_of(
    st.builds(lambda number: {"intValue": number}, NUMBERS | st.integers() | st.floats(allow_nan=False)),
    st.builds(lambda text: {"stringValue": text}, st.text(max_size=3) | st.integers()),
    st.builds(lambda items: {"arrayValue": {"values": items}}, st.lists(NUMBERS.map(lambda n: {"intValue": n}))),
    st.builds(lambda items: {"arrayValue": {"values": items}}, st.lists(st.text().map(lambda t: {"stringValue": t}))),
    st.sampled_from([{}, None, [], {"boolValue": True}, {"arrayValue": {}}, {"arrayValue": 3}, {"doubleValue": 1e300}]),
)


def rewrite(text: bytes, kind: str, dice: random.Random, value: object) -> bytes:
    """Takes an attribute out, or puts ``value`` in the place of an attribute's or of an array's element."""
    try:
        span = orjson.loads(text)["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
        whole = orjson.loads(text)
        where = whole["resourceSpans"][0]
        span = where["scopeSpans"][0]["spans"][0]
        attributes = where["resource"]["attributes"] if dice.random() < 0.1 else span["attributes"]
        at = dice.randrange(len(attributes))
        if kind == "attribute":
            del attributes[at]
        elif "arrayValue" in attributes[at]["value"] and dice.random() < 0.7:
            items = attributes[at]["value"]["arrayValue"]["values"]
            items[dice.randrange(len(items))] = value
        elif dice.random() < 0.1:
            span[dice.choice(sorted(span))] = value
        else:
            attributes[at]["value"] = value
        return orjson.dumps(whole)
    except (orjson.JSONDecodeError, orjson.JSONEncodeError, KeyError, TypeError, ValueError, IndexError):
        return text


@given(mutations(), st.sampled_from([bytes, gzip.compress]))
def test_any_damage_gives_advice_or_a_trace_of_the_declared_schemas(
    data: bytes, compress: Callable[[bytes], bytes]
) -> None:
    with folder() as path:
        (path / "t.otlp.jsonl").write_bytes(compress(data))
        try:
            trace = read_trace(path / "t.otlp.jsonl")
        except UsageError:
            return
        for name, table in trace.tables.items():
            table.validate(full=True)
            assert table.schema == TABLES[name]
        assert all(finding.count > 0 and "\n" not in finding.text for finding in trace.validate())
        write_parquet(trace, path / "tables")


# --- Parquet ------------------------------------------------------------------------------------------------


def test_parquet_returns_the_same_trace(tmp_path: Path) -> None:
    lines = busy().lines()
    trace = read([*lines[:9], b"garbage", *lines[12:]])
    write_parquet(trace, tmp_path / "tables")
    assert read_trace(tmp_path / "tables") == trace


def test_damage_within_a_stored_table_is_found_when_it_is_read(tmp_path: Path) -> None:
    write_parquet(read(busy().lines()), tmp_path / "tables")
    (file,) = (tmp_path / "tables" / "steps").rglob("*.parquet")
    damaged = bytearray(file.read_bytes())
    damaged[40:80] = bytes(40)
    file.write_bytes(damaged)
    stored = read_trace(tmp_path / "tables")
    assert stored.requests.num_rows > 0
    with pytest.raises(UsageError, match="not readable as the table steps"):
        _ = stored.steps


def test_parquet_is_neither_written_over_nor_guessed(tmp_path: Path) -> None:
    trace = read(steady().lines())
    write_parquet(trace, tmp_path / "tables")
    with pytest.raises(UsageError, match="not empty"):
        write_parquet(trace, tmp_path / "tables")
    (file,) = (tmp_path / "tables" / "steps").rglob("*.parquet")
    file.write_bytes(b"PAR1 or what")
    stored = read_trace(tmp_path / "tables")
    with pytest.raises(UsageError, match="not readable as the table steps"):
        _ = stored.steps
    file.unlink()
    with pytest.raises(UsageError, match="not readable as the table steps"):
        stored.columns("steps", ["ready"])
    metadata = tmp_path / "tables" / "trace.json"
    metadata.write_bytes(metadata.read_bytes().replace(b'"format": 3', b'"format": 9'))
    with pytest.raises(UsageError, match="format 9"):
        read_trace(tmp_path / "tables")
