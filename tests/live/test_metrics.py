"""/metrics of a real collector, as scrapers ask for it: Prometheus among them; and the same pushed by it."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from stallscope.live.bodies import PROTOBUF
from stallscope.live.intake import Intake
from stallscope.live.over_http import HttpServer
from stallscope.live.store import Limits, Store
from stallscope.watch.families import BLAME, RECEIVED, SERIES, TTFT
from stallscope.watch.scores import Scores
from stallscope.watch.snapshot import Snapshot
from tests.live.collecting import Running, collecting, eventually, request
from tests.watch.pushed import receiver, values_of
from tests.watch.scoring import HOSTILE, blame, buckets, of, parse_exposition

OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
LIMITS = Limits(rotate_bytes=1_000_000, rotate_s=3600.0, disk_bytes=10_000_000, message_bytes=100_000)
PROMETHEUS = shutil.which("prometheus")


@contextmanager
def serving(folder: Path, scores: Scores) -> Iterator[str]:
    """The collector's HTTP server, with an intake that writes, in a thread; its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    servers: list[HttpServer] = []

    async def serve() -> None:
        store = Store(folder, LIMITS)
        intake = Intake(store, 1_000_000)
        writing = asyncio.create_task(intake.run())
        servers.append(HttpServer(intake, LIMITS.message_bytes, scores))
        await servers[0].serve([listener])
        intake.end()
        await writing
        store.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        eventually(lambda: bool(servers) and servers[0].started)
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        servers[0].should_exit = True
        thread.join()


def metrics_of(running: Running) -> str:
    return running.url.replace("/v1/traces", "/metrics")


def test_a_collector_without_a_watch_shows_what_it_has_received(tmp_path: Path) -> None:
    sound = request(random.Random(1), 5)
    spoilt = request(random.Random(2), 3)
    spoilt.resource_spans[0].scope_spans[0].spans[0].span_id = b"short"
    with collecting(tmp_path, "--no-watch") as running:
        for message in (sound, sound, spoilt):  # one was sent again
            assert running.post(message.SerializeToString()).status_code == 200
        answer = running.client.get(metrics_of(running), headers={"Accept": OPENMETRICS})
        assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        exposed = parse_exposition(answer.text)
        assert exposed == {
            of(RECEIVED): 7,
            ("stallscope_refused_spans_total", ()): 1,
            of(SERIES): 3,
        }


def test_the_format_and_the_compression_are_those_that_were_asked_for(tmp_path: Path) -> None:
    scores = Scores()
    scores.blame("chat", 'quo"te', "kv_pinning", 3.0)
    with serving(tmp_path, scores) as address, httpx.Client() as client:
        url = f"http://{address}/metrics"
        plain = client.get(url, headers={"Accept": "text/plain;version=0.0.4", "Accept-Encoding": "identity"})
        assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert "content-encoding" not in plain.headers
        assert r'culprit="quo\"te",mechanism="kv_pinning",victim="chat"} 0.0' in plain.text
        with client.stream("GET", url, headers={"Accept": OPENMETRICS, "Accept-Encoding": "gzip"}) as zipped:
            text = gzip.decompress(b"".join(zipped.iter_raw())).decode()
        assert zipped.headers["content-encoding"] == "gzip"
        assert parse_exposition(text)[blame("chat", 'quo"te')] == 3
        assert client.post(url).status_code == 405
        assert "/metrics" in client.get(f"http://{address}/", headers={"Accept": "application/json"}).json()["message"]


def test_a_look_at_the_headers_alone_is_no_scrape(tmp_path: Path) -> None:
    scores = Scores()
    scores.blame("chat", "newcomer", "kv_pinning", 3.0)
    with serving(tmp_path, scores) as address, httpx.Client() as client:
        url = f"http://{address}/metrics"
        assert client.head(url).status_code == 200
        texts = [client.get(url, headers={"Accept": OPENMETRICS}).text for _ in range(2)]
    assert [parse_exposition(text)[blame("chat", "newcomer")] for text in texts] == [0, 3]


class Slow(Scores):
    """A scrape of it waits until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.may_go_on = threading.Event(), threading.Event()

    def snapshot(self) -> Snapshot:
        self.begun.set()
        assert self.may_go_on.wait(60)
        return super().snapshot()


def test_a_scrape_that_takes_long_holds_up_no_spans(tmp_path: Path) -> None:
    with serving(tmp_path, scores := Slow()) as address, httpx.Client(timeout=60) as client:
        scrape = threading.Thread(target=lambda: httpx.get(f"http://{address}/metrics", timeout=60))
        scrape.start()
        assert scores.begun.wait(60)
        body = request(random.Random(1), 5).SerializeToString()
        answer = client.post(f"http://{address}/v1/traces", content=body, headers={"Content-Type": PROTOBUF})
        assert answer.status_code == 200
        scores.may_go_on.set()
        scrape.join()


def test_a_scraper_that_has_hung_up_has_seen_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, scores := Slow()) as address, httpx.Client(timeout=60) as client:
        scores.blame("chat", "newcomer", "kv_pinning", 3.0)
        host, _, port = address.partition(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            assert scores.begun.wait(60)
        for _ in range(3):  # so that the server has heard of that
            client.get(f"http://{address}/")
        scores.may_go_on.set()
        texts = [client.get(f"http://{address}/metrics", headers={"Accept": OPENMETRICS}).text for _ in range(2)]
    assert [parse_exposition(text)[blame("chat", "newcomer")] for text in texts] == [0, 3]


@pytest.mark.skipif(PROMETHEUS is None, reason="Debian's prometheus is not installed")
def test_prometheus_sees_a_first_offence_rise_from_zero_and_every_name_as_it_is(tmp_path: Path) -> None:
    assert PROMETHEUS is not None
    victims = [name for name in HOSTILE if name]
    scores = Scores()
    with serving(tmp_path / "spans", scores) as address:
        with socket.create_server(("127.0.0.1", 0)) as free:
            own = f"127.0.0.1:{free.getsockname()[1]}"
        configuration = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
            "scrape_configs": [{"job_name": "stallscope", "static_configs": [{"targets": [address]}]}],
        }
        (tmp_path / "prometheus.yml").write_text(json.dumps(configuration), encoding="utf-8")
        command = [
            PROMETHEUS,
            "--config.file=prometheus.yml",
            "--storage.tsdb.path=data",
            f"--web.listen-address={own}",
        ]
        with (
            (tmp_path / "log").open("w") as log,
            subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log) as process,
            httpx.Client(base_url=f"http://{own}/api/v1", timeout=10) as client,
        ):
            try:

                def query(text: str) -> list[dict[str, Any]]:
                    with suppress(httpx.HTTPError):  # it starts
                        answer = client.get("/query", params={"query": text})
                        if answer.is_success:
                            found: list[dict[str, Any]] = answer.json()["data"]["result"]
                            return found
                    return []

                eventually(lambda: query('up{job="stallscope"} == 1') != [])
                for victim in victims:
                    scores.blame(victim, "newcomer", "kv_pinning", 5.0)
                    scores.observe(TTFT, (victim,), buckets(0, 1), 0.07)
                eventually(lambda: len(query(f"{BLAME.name} == 5")) == len(victims))
                risen = query(f"increase({BLAME.name}[1m]) > 0")
                assert {one["metric"]["victim"] for one in risen} == set(map(shown, victims))
                (scraped,) = query("scrape_samples_scraped")
                (series,) = query(SERIES.name)
                created = 2  # of the two families without labels, which Prometheus 2.42 keeps as series
                assert float(scraped["value"][1]) == float(series["value"][1]) + created
            finally:
                process.send_signal(signal.SIGTERM)


def shown(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def test_a_collector_pushes_what_it_has_received_also_what_came_last(tmp_path: Path) -> None:
    with receiver() as (url, requests), collecting(tmp_path, "--metrics-to", url) as running:
        eventually(lambda: bool(requests))
        assert running.post(request(random.Random(1), 5).SerializeToString()).status_code == 200
        running.end(signal.SIGTERM)
        assert running.errors() == ""
    assert values_of(ExportMetricsServiceRequest.FromString(requests[-1]))[of(RECEIVED)] == 5


def test_a_receiver_of_metrics_that_is_away_is_said_once_and_harms_nothing(tmp_path: Path) -> None:
    with collecting(tmp_path, "--metrics-to", "http://127.0.0.1:1") as running:
        assert running.post(request(random.Random(1), 5).SerializeToString()).status_code == 200
        running.end(signal.SIGTERM)
        (line,) = running.errors().splitlines()
    assert line.startswith("http://127.0.0.1:1/v1/metrics can't be reached")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--metrics-to", "nowhere"), "--metrics-to nowhere: give a URL such as http://127.0.0.1:4318/v1/metrics"),
        (("--metrics-to", "http://[::1"), "--metrics-to http://[::1: "),
        (("--max-series", "3"), "--max-series 3 must be at least 500"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_a_line(tmp_path: Path, options: tuple[str, str], said: str) -> None:
    command = ["collect", "-o", str(tmp_path / "out"), "--http", "127.0.0.1:0", "--grpc", "off", *options]
    program = "from stallscope.cli import main; main()"
    run = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert said in run.stderr
    assert "Traceback" not in run.stderr
