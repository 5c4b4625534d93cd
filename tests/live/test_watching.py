"""The watch beside a collector: what is sent is seen at /metrics; whatever becomes of it, nothing is lost on disk."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from stallscope.trace import Trace, read_trace
from stallscope.watch import families
from stallscope.watch.families import Family
from tests.live.collecting import Running, collecting, eventually, request, stored, trace_ids
from tests.watch.scoring import parse_exposition
from tests.watch.streams import gaps_in, tokens_in

OWN_GROUP = "import os; os.setsid()"  # so that a signal to all of its processes is none to the tests


def metrics(running: Running) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    url = running.url.replace("/v1/traces", "/metrics")
    return parse_exposition(running.client.get(url, headers={"Accept": "application/openmetrics-text"}).text)


def total(running: Running, family: Family, suffix: str = "", **labels: str) -> float:
    return sum(
        value
        for (name, named), value in metrics(running).items()
        if name == family.name + suffix and labels.items() <= dict(named).items()
    )


def record_to(running: Running, out: Path) -> Trace:
    """Records a scenario whose spans go to the collector, too."""
    command = [sys.executable, "-m", "stallscope.cli", "record", "kv_pinning", "--variant", "sample"]
    environment = {**os.environ, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": running.url}
    subprocess.run(
        [*command, "--executor", "virtual", "-o", str(out)], check=True, env=environment, capture_output=True
    )
    return read_trace(out)


def watch_of(running: Running) -> int | None:
    """The process of its watch, once that has begun."""
    for pid in children_of(running.process.pid):
        with suppress(OSError):
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    return None


def children_of(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(status.parent.name))
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")


def test_what_an_engine_sends_is_at_metrics_with_the_numbers_of_its_trace(tmp_path: Path) -> None:
    with collecting(tmp_path / "spans", "--slo", "ttft=350ms@p99") as running:
        trace = record_to(running, tmp_path / "written.otlp.jsonl")
        steps = trace.steps.num_rows
        eventually(lambda: total(running, families.STEPS) == steps)
        prefill, decode, recomputed = tokens_in(trace)
        for tenant in prefill:
            assert total(running, families.TOKENS, tenant=tenant, phase="prefill") == prefill[tenant]
            assert total(running, families.TOKENS, tenant=tenant, phase="decode") == decode[tenant]
            assert total(running, families.RECOMPUTED, tenant=tenant) == recomputed[tenant]
            assert total(running, families.ITL, "_count", tenant=tenant) == gaps_in(trace)[tenant][0]
        rows = trace.requests.to_pylist()
        asked = Counter(row["tenant"] for row in rows)
        within = Counter(
            row["tenant"]
            for row in rows
            if row["first_token"] is not None and row["first_token"] - row["arrival"] <= 350_000_000
        )
        for tenant, number in asked.items():
            assert total(running, families.REQUESTS, tenant=tenant) == number
            assert total(running, families.TTFT, "_bucket", tenant=tenant, le="0.35") == within[tenant]
        assert total(running, families.STEPS_LOST) == 0
        assert total(running, families.UNWATCHED) == 0
        assert total(running, families.RECEIVED) == steps + len(rows)
        running.end(signal.SIGTERM)
    assert running.errors() == ""


def test_a_watch_that_is_killed_is_started_again_and_nothing_is_lost_on_disk(tmp_path: Path) -> None:
    ids, sent = random.Random(1), []
    with collecting(tmp_path / "spans") as running:
        eventually(lambda: watch_of(running) is not None)
        first = watch_of(running)
        assert first is not None
        for number in range(30):
            message = request(ids, 5)
            sent += trace_ids(message)
            assert running.post(message.SerializeToString()).status_code == 200
            if number == 10:
                os.kill(first, signal.SIGKILL)
        eventually(lambda: watch_of(running) not in (None, first))
        trace = record_to(running, tmp_path / "written.otlp.jsonl")
        eventually(lambda: total(running, families.STEPS) == trace.steps.num_rows)
        running.end(signal.SIGTERM)
    found, damage = stored(tmp_path / "spans")
    assert set(sent) <= set(found)
    assert not damage
    assert "it starts again" in running.errors()


def test_while_a_watch_hangs_senders_are_acknowledged_and_what_it_misses_is_told(tmp_path: Path) -> None:
    ids, sent = random.Random(2), []
    before = "from stallscope.live import watching; watching.MOST_PENDING_BYTES = 300_000; watching._END_S = 1.0"
    with collecting(tmp_path, before=before) as running:
        eventually(lambda: watch_of(running) is not None)
        watch = watch_of(running)
        assert watch is not None
        os.kill(watch, signal.SIGSTOP)
        for _ in range(60):
            message = request(ids, 10, padding=2_000)
            sent += trace_ids(message)
            assert running.post(message.SerializeToString()).status_code == 200
        missed = total(running, families.UNWATCHED)
        assert 0 < missed < 60
        os.kill(watch, signal.SIGCONT)

        def is_watched_again() -> bool:
            before, message = total(running, families.UNWATCHED), request(ids, 10, padding=20_000)
            sent.extend(trace_ids(message))
            assert running.post(message.SerializeToString()).status_code == 200
            return total(running, families.UNWATCHED) == before

        eventually(is_watched_again)
        os.kill(watch, signal.SIGSTOP)
        running.end(signal.SIGTERM)
        assert not is_alive(watch)
    assert set(stored(tmp_path)[0]) == set(sent)
    assert "Traceback" not in running.errors()


@pytest.mark.parametrize("wait_s", [0.0, 4.0])
def test_an_interrupt_at_the_terminal_ends_both_without_a_word(tmp_path: Path, wait_s: float) -> None:
    with collecting(tmp_path, before=OWN_GROUP) as running:
        eventually(lambda: watch_of(running) is not None)
        watch = watch_of(running)
        assert watch is not None
        time.sleep(wait_s)  # it may still import, or watch already
        os.killpg(running.process.pid, signal.SIGINT)
        assert running.process.wait(60) == 0
        eventually(lambda: not is_alive(watch))
        assert children_of(running.process.pid) == []
    assert running.errors() == ""


def test_a_watch_ends_with_a_collector_that_was_killed(tmp_path: Path) -> None:
    with collecting(tmp_path) as running:
        eventually(lambda: watch_of(running) is not None)
        watch = watch_of(running)
        assert watch is not None
        running.process.kill()
        running.process.wait()
        eventually(lambda: not is_alive(watch))
        assert "Traceback" not in running.errors()


def test_without_a_watch_there_is_no_process_of_it_and_spans_are_kept(tmp_path: Path) -> None:
    message = request(random.Random(3), 4)
    with collecting(tmp_path, "--no-watch") as running:
        assert running.post(message.SerializeToString()).status_code == 200
        assert total(running, families.RECEIVED) == 4
        assert children_of(running.process.pid) == []
        running.end(signal.SIGINT)
    assert set(stored(tmp_path)[0]) == set(trace_ids(message))
