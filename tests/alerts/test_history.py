"""Thresholds from a running Prometheus: a real one, with a day that was written into it beforehand."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator

import httpx
import pytest

from stallscope.alerts import settings as s
from stallscope.alerts.history import FromPrometheus
from stallscope.alerts.plain_pack import Gauge
from stallscope.alerts.quantities import Counted
from stallscope.alerts.settings import Limit
from stallscope.errors import UsageError
from stallscope.watch import families as f

WAIT_S = 60.0
END_S = int(time.time()) // 60 * 60 - 3600
HOURS = 3
STALL_S = range(END_S - 3600, END_S - 3000)  # blame was charged, and all else was worse, too
LIMIT = Limit(0.1, "because")
pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="Prometheus is not installed (Debian: apt install prometheus)",
)


def exposition() -> str:
    """Three hours, a sample every 30 s."""
    times = range(END_S - HOURS * 3600, END_S, 30)
    lines: list[str] = []
    counters = {
        f'{f.PREEMPTIONS.name}{{tenant="chat"}}': (0.05, 9.0),
        f'{f.BLAME.name}{{victim="chat",culprit="hog",mechanism="kv_pinning"}}': (0.0, 5.0),
    }
    for series, (calm, stalled) in counters.items():
        lines.append(f"# TYPE {series.partition('{')[0].removesuffix('_total')} counter")
        value = 0.0
        for when in times:
            value += 30 * (stalled if when in STALL_S else calm)
            lines.append(f"{series} {value} {when}")
    lines.append("# TYPE vllm:num_requests_waiting gauge")
    for when in times:
        lines.append(
            f'vllm:num_requests_waiting{{model_name="m",instance="a:1"}} {90 if when in STALL_S else 4} {when}'
        )
    return "\n".join([*lines, "# EOF", ""])


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "day.om").write_text(exposition(), encoding="utf-8")
    (folder / "prometheus.yml").write_text("global: {}\n", encoding="utf-8")
    filled = ["promtool", "tsdb", "create-blocks-from", "openmetrics", "day.om", "data"]
    subprocess.run(filled, cwd=folder, check=True, capture_output=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    log = (folder / "log").open("wb")
    process = subprocess.Popen(
        ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address={address}"],
        cwd=folder,
        stdout=log,
        stderr=log,
    )
    try:
        deadline = time.monotonic() + WAIT_S
        while not ready(f"http://{address}"):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(WAIT_S)
        log.close()


def ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def test_a_day_s_calm_sets_the_threshold_and_blamed_stretches_don_t(url: str) -> None:
    threshold = FromPrometheus(url, END_S).threshold(Counted(f.PREEMPTIONS, (), s.PREEMPTION_WINDOW_S), LIMIT)
    assert threshold.otherwise.value == pytest.approx(0.15, rel=0.01)
    assert threshold.otherwise.reason.startswith("3 x the p99 of 2 h ")
    assert "without blame" in threshold.otherwise.reason


def test_what_an_engine_exports_is_learned_alike(url: str) -> None:
    threshold = FromPrometheus(url, END_S).threshold(Gauge("vllm:num_requests_waiting", 60), s.PLAIN_QUEUE)
    assert threshold.otherwise.value == 12.0
    assert not threshold.own


def test_blame_can_t_be_learned_where_it_counts_as_no_calm(url: str) -> None:
    level = FromPrometheus(url, END_S).threshold(Counted(f.BLAME, ("culprit",), 60), LIMIT).otherwise
    assert level.value == 0.1
    assert "a history can't teach it" in level.reason


def test_what_it_does_not_have_leaves_the_floor(url: str) -> None:
    level = (
        FromPrometheus(url, END_S).threshold(Counted(f.STEPS_LOST, ("replica",), 600, over=f.STEPS), LIMIT).otherwise
    )
    assert level.value == 0.1
    assert "had nothing of it in 24 h" in level.reason


def test_a_short_history_teaches_nothing(url: str) -> None:
    early = FromPrometheus(url, END_S - HOURS * 3600 + 300)
    level = early.threshold(Gauge("vllm:num_requests_waiting", 60), s.PLAIN_QUEUE).otherwise
    assert level.value == s.PLAIN_QUEUE.floor
    assert "too short to learn from" in level.reason


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "nonsense", "http://[::1"])
def test_an_address_that_does_not_answer_is_one_line(address: str) -> None:
    with pytest.raises(UsageError, match="does not answer") as refused:
        FromPrometheus(address).threshold(Gauge("up", 60), LIMIT)
    assert "\n" not in str(refused.value)


def test_a_query_that_prometheus_refuses_is_said_in_its_words(url: str) -> None:
    with pytest.raises(UsageError, match=r"could not answer: .*parse error"):
        FromPrometheus(url, END_S).threshold(Gauge("up{", 60), LIMIT)
