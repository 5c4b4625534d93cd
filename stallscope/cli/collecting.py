"""The command that receives spans over the network: collect."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stallscope.cli.shared import length_s
from stallscope.errors import UsageError

if TYPE_CHECKING:
    from stallscope.live.collector import Address

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B", re.IGNORECASE)
_PREFIXES = ("", "K", "M", "G", "T")
_LEAST_SEGMENTS = 3  # one that is written, one that is compressed, one that is kept
_LEAST_BODIES = 2  # a compressed body is there twice


def collect(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write into: a trace, as analyze reads it.")],
    http: Annotated[str, typer.Option(help="HOST:PORT for OTLP/HTTP, or off.")] = "127.0.0.1:4318",
    grpc: Annotated[str, typer.Option(help="HOST:PORT for OTLP/gRPC, or off.")] = "127.0.0.1:4317",
    disk_budget: Annotated[str, typer.Option(help="For all that is kept; the oldest goes first.")] = "20GB",
    rotate_size: Annotated[str, typer.Option(help="Size at which a file is closed, and compressed.")] = "64MB",
    rotate_age: Annotated[str, typer.Option(help="Age at which it is, too: 90s, 15m, 1h, 1d.")] = "1h",
    max_pending: Annotated[
        str, typer.Option(help="Bytes in memory that wait to be written; with more, senders are told to come again.")
    ] = "128MB",
    max_body: Annotated[str, typer.Option(help="Largest request, once decompressed.")] = "20MiB",
    metrics_to: Annotated[
        str | None, typer.Option(help="URL of an OTLP/HTTP endpoint that gets what /metrics shows, every 10 s.")
    ] = None,
    max_series: Annotated[int, typer.Option(help="Series on /metrics; the rest is counted as (other).")] = 20_000,
    slo: Annotated[
        list[str] | None,
        typer.Option(
            help="What counts as stalled, in place of the usual, and a bound of the histograms: ttft=500ms@p99, or "
            "chat:itl=100ms@p99 for one tenant; may be given again."
        ),
    ] = None,
    watch: Annotated[bool, typer.Option(help="Diagnose stalls while they go on, for /metrics.")] = True,
) -> None:
    """Receive spans over OTLP (HTTP and gRPC) and keep them in a folder that is a trace.

    Only what is safely on disk is acknowledged. SIGINT or SIGTERM ends it, with nothing lost. The HTTP port has
    /metrics for Prometheus, too.
    """
    try:
        from stallscope.diagnosis.slo import parse_slo
        from stallscope.live.collector import collect as run
        from stallscope.live.store import Limits
        from stallscope.live.watching import Watching
        from stallscope.watch.rehearsal import bounds_with
        from stallscope.watch.scores import LEAST_SERIES, Scores
    except ModuleNotFoundError as error:
        raise UsageError(f"the collector needs {error.name}: pip install 'stallscope[collect]'") from error
    limits = Limits(
        rotate_bytes=_bytes("--rotate-size", rotate_size),
        rotate_s=length_s("--rotate-age", rotate_age),
        disk_bytes=_bytes("--disk-budget", disk_budget),
        message_bytes=_bytes("--max-body", max_body),
    )
    held = _bytes("--max-pending", max_pending)
    if limits.disk_bytes < _LEAST_SEGMENTS * limits.segment_bytes:
        raise UsageError(
            f"--disk-budget {disk_budget} must be at least {_LEAST_SEGMENTS} times --rotate-size and --max-body"
        )
    if held < _LEAST_BODIES * limits.message_bytes:
        raise UsageError(f"--max-pending {max_pending} must be at least {_LEAST_BODIES} times --max-body")
    addresses = _address("--http", http), _address("--grpc", grpc)
    if addresses == (None, None):
        raise UsageError("--http off and --grpc off leave nothing to receive by; give one of them an address")
    if max_series < LEAST_SERIES:
        raise UsageError(f"--max-series {max_series} must be at least {LEAST_SERIES}")

    slos = [parse_slo(text) for text in slo or ()]
    scores = Scores(most_series=max_series, bounds=bounds_with(slos))
    watching = Watching(scores, slos) if watch else None

    def ready(over_http: Address | None, over_grpc: Address | None) -> None:
        where = [f"http://{over_http}/v1/traces"] if over_http is not None else []
        where += [f"gRPC at {over_grpc}"] if over_grpc is not None else []
        metrics = f"metrics at http://{over_http}/metrics; " if over_http is not None else ""
        if watching is not None:
            watching.start()
        typer.echo(f"collecting into {out}: {', '.join(where)}; {metrics}Ctrl-C ends it")

    try:
        done = run(
            out,
            limits,
            held,
            http=addresses[0],
            grpc=addresses[1],
            ready=ready,
            listeners=[watching] if watching is not None else [],
            scores=scores,
            metrics_to=None if metrics_to is None else _endpoint("--metrics-to", metrics_to),
        )
    finally:
        if watching is not None:
            watching.close()
    counts = done.counts
    parts = [f"received {counts.spans:,} spans in {counts.requests:,} requests ({counts.repeated:,} sent again)"]
    if counts.refused or counts.refused_spans:
        parts.append(f"refused {counts.refused:,} requests, and {counts.refused_spans:,} spans of others")
    if done.removed:
        parts.append(f"removed {done.removed:,} old files ({done.removed_bytes / 1e6:,.1f} MB)")
    parts.append(f"{out} has {done.stored_bytes / 1e6:,.1f} MB")
    typer.echo("; ".join(parts))


def _bytes(option: str, text: str) -> int:
    """An amount such as 64MB (10^6) or 64MiB (2^20)."""
    found = _SIZE.fullmatch(text.strip())
    if found is None or not float(found[1]):
        raise UsageError(f"{option} {text}: give a size such as 64MB or 20GB")
    thousand = 1024 if found[3] else 1000
    size: float = float(found[1]) * thousand ** _PREFIXES.index(found[2].upper())
    return round(size)


def _endpoint(option: str, text: str) -> str:
    """A URL, with OTLP's own path where it has none."""
    import httpx

    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise UsageError(f"{option} {text}: {error}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise UsageError(f"{option} {text}: give a URL such as http://127.0.0.1:4318/v1/metrics")
    return str(url.copy_with(path="/v1/metrics") if url.path == "/" else url)


def _address(option: str, text: str) -> Address | None:
    """HOST:PORT, an IPv6 address in brackets; None for off."""
    from stallscope.live.collector import Address

    if text == "off":
        return None
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"{option} {text}: give HOST:PORT, such as 127.0.0.1:4318, or off")
    return Address(host.removeprefix("[").removesuffix("]"), int(port))
