"""`read_trace`: a path to one `Trace`, whatever it holds; nothing that is sound in a damaged recording is lost."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from stallscope.errors import UsageError
from stallscope.trace import parquet
from stallscope.trace.clients import client_table
from stallscope.trace.configuration import RESOURCE_COLUMNS
from stallscope.trace.decode import (
    LATEST,
    MOST,
    NOT_MEASURED,
    Collected,
    GpuSpan,
    Ints,
    ReplicaSpans,
    RequestSpan,
    Steps,
    collect,
)
from stallscope.trace.estimated import FIDELITY_REQUESTS, estimated_tables
from stallscope.trace.findings import Findings
from stallscope.trace.frontends import join_frontends
from stallscope.trace.gaps import (
    TokenTimes,
    first_tokens,
    gap_table,
    mean_gaps,
    seen_token_times,
    told_token_times,
)
from stallscope.trace.gpu import gpu_table
from stallscope.trace.model import Trace
from stallscope.trace.otlp import Progress, Reader, Resource, Source, find_sources, recent_sources, shown
from stallscope.trace.plain_spans import engine_of
from stallscope.trace.rebuild import Rebuilt, rebuild
from stallscope.trace.reconstruct import known_clock, reconstruct
from stallscope.trace.requests import KnownRequest, StepTimes, match_requests, request_table, told_stations
from stallscope.trace.residency import ResidencyColumns, residency_columns, residency_table
from stallscope.trace.schema import TABLES
from stallscope.trace.select import between, span
from stallscope.trace.tables import Column, encode, names_at, plain_table, same
from stallscope.trace.validate import check_times
from stallscope_telemetry import names

FIDELITY_BATCHES, FIDELITY_SUMS = 3, 2

Plain = Mapping[str, pa.Table]


def read_trace(path: str | Path, progress: Progress | None = None) -> Trace:
    """Reads OTLP (JSON or protobuf; plain, gzip or zstd) from all that ``path`` names (``otlp.sources``), or the folder
    that `write_parquet` wrote.

    ``progress`` is called with bytes read and bytes in all, where they are known. Raises UsageError where there is
    nothing sound to read; anything less is a finding in the trace.
    """
    if parquet.is_trace_folder(Path(path)):
        return parquet.read_parquet(Path(path))
    with _no_garbage_collection():
        return _read_sources(find_sources(path), shown(path), progress)


def read_recent(folder: Path, last_s: float) -> Trace:
    """The last seconds of a folder that spans are being written to, up to the last step in it.

    Raises UsageError where nothing came for so long.
    """
    if parquet.is_trace_folder(folder):
        trace = parquet.read_parquet(folder)
    else:
        with _no_garbage_collection():
            trace = _read_sources(recent_sources(folder, time.time() - last_s), str(folder), None)
    _, end = span(trace)
    return between(trace, end - int(last_s * 1e9), end)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Decoding makes millions of small dictionaries and no cycles: looking for cycles takes half of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _read_sources(sources: Sequence[Source], path: str, progress: Progress | None) -> Trace:
    findings = Findings()
    reader = Reader(findings, progress)
    collected = collect(reader.read(sources), findings)
    if not reader.saw_otlp:
        damaged = (one.text for one in findings.all() if one.kind in ("damaged_file", "unreadable_file"))
        damage = next((f" ({text.partition(';')[0]})" for text in damaged), "")
        raise UsageError(
            f"{path}: no OTLP in it{damage}; expected what OpenTelemetry exports, JSON or protobuf, plain, gzip or zstd"
        )
    return trace_of(collected, path, findings)


def trace_of(collected: Collected, path: str, findings: Findings) -> Trace:
    """The trace that spans make; ``path`` says where they came from. Raises UsageError where nothing is sound."""
    join_frontends(list(collected.replicas.values()))
    if collected.step_count == 0 and collected.request_count == 0 and collected.clients:
        raise UsageError(
            f"{path} holds only what clients saw ({len(collected.clients)} llm_client spans); "
            "put the engine's trace into the same folder"
        )
    text = "left out: spans that are neither engine.step nor llm_request, llm_client or gpu.sample"
    findings.add("foreign_spans", path, "", text, collected.foreign)
    lives = list(_lives(collected, findings))
    if collected.step_count and not any(len(life.steps) for life in lives):
        raise UsageError(
            f"{path}: none of its {collected.step_count} engine.step spans has sound times and index; record it again"
        )
    parts = [_tables_of(life, findings) for life in lives]
    if not any(part["steps"].num_rows for part in parts):
        spans = "request span" if collected.request_count == 1 else "request spans"
        raise UsageError(
            f"{path} has {collected.request_count} {spans}, no engine.step spans, and nothing that says when a request "
            "was scheduled and answered; turn on the engine's tracing, or stallscope's telemetry hook in it"
        )
    parts += [{"gpu": gpu_table(one.name, one.samples, findings)} for one in _samplers(collected)]
    tables = {name: encode(name, [part[name] for part in parts if name in part]) for name in TABLES}
    tables["clients"] = encode("clients", [client_table(collected.clients, tables["requests"], findings)])
    for finding in check_times(tables):
        findings.add(finding.kind, finding.where, "", finding.text, finding.count)
    return Trace(tables, path, findings.all())


# --- one life of a replica's process ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Life:
    """One process of a replica, from its start to its end. ``resources`` by number."""

    name: str
    steps: Steps
    requests: list[RequestSpan]
    samples: list[GpuSpan]
    resources: list[Resource]


def _lives(collected: Collected, findings: Findings) -> Iterator[_Life]:
    """Replicas by name; one whose step index began again is two: the later life is named "NAME #2"."""
    for name in sorted(collected.replicas):
        spans = collected.replicas[name]
        if not spans.rows and not spans.requests:
            continue
        steps = spans.steps(findings)
        steps = steps.take(np.lexsort((steps.columns["ready"], steps.columns["step"], steps.columns["scheduled"])))
        life = _life_numbers(steps.columns["step"], steps.columns["scheduled"])
        starts = steps.columns["scheduled"][np.flatnonzero(np.diff(life, prepend=-1))]
        belongs = np.searchsorted(starts, [request.end for request in spans.requests], side="right") - 1
        sampled = np.searchsorted(starts, [sample.time for sample in spans.samples], side="right") - 1
        resources = list(spans.resources)
        for number in range(max(len(starts), 1)):
            yield _Life(
                name if number == 0 else f"{name} #{number + 1}",
                _without_duplicates(steps.take(life == number), resources, name, findings),
                [one for one, at in zip(spans.requests, belongs, strict=True) if max(at, 0) == number],
                [one for one, at in zip(spans.samples, sampled, strict=True) if max(at, 0) == number],
                resources,
            )


def _samplers(collected: Collected) -> list[ReplicaSpans]:
    """Replicas that sent GPU samples and nothing else: a sampler that is a process of its own."""
    only = [one for one in collected.replicas.values() if one.samples and not one.rows and not one.requests]
    return sorted(only, key=lambda one: one.name)


def _life_numbers(steps: Ints, scheduled: Ints) -> Ints:
    """Which life of the process each step belongs to, for steps in the order of their times.

    A process has begun again where this step and the next have indices that were passed already. One step alone with
    such an index is a duplicate or has a wrong time.
    """
    fresh = np.ones(len(steps), dtype=np.bool_)
    fresh[1:] = (np.diff(steps) != 0) | (np.diff(scheduled) != 0)
    index = steps[fresh]
    restarts = np.zeros(len(index), dtype=np.int64)
    if len(index) > 2:
        before = index[:-2]
        second_before = np.concatenate([index[:1], index[:-3]])
        here, after = index[1:-1], index[2:]
        low, high = np.minimum(before, second_before), np.maximum(before, second_before)
        restarts[1:-1] = (here <= low) & (here < high) & (after <= high)
    life = np.cumsum(restarts)
    return np.asarray(life[np.cumsum(fresh) - 1] if len(index) else life, dtype=np.int64)


def _without_duplicates(steps: Steps, resources: Sequence[Resource], replica: str, findings: Findings) -> Steps:
    """Steps in the order of their index, each once: the one with the earliest times."""
    columns = steps.columns
    steps = steps.take(np.lexsort((columns["ready"], columns["scheduled"], columns["step"])))
    index = steps.columns["step"]
    keep = np.ones(len(steps), dtype=np.bool_)
    for step in np.unique(index[1:][np.diff(index) == 0]).tolist():
        positions = np.flatnonzero(index == step)
        contents = [_content(steps, resources, position) for position in positions.tolist()]
        first = min(contents)
        same_words = contents.count(first) - 1
        keep[positions] = False
        keep[positions[contents.index(first)]] = True
        text = "steps came twice, in the same words; one counts"
        findings.add("duplicate_step", replica, f" step {step}", text, same_words)
        text = "steps came twice with different content; the earliest counts"
        findings.add("conflicting_step", replica, f" step {step}", text, len(contents) - 1 - same_words)
    return steps.take(keep)


def _content(steps: Steps, resources: Sequence[Resource], position: int) -> tuple[list[int], str]:
    """All that a step says, in an order that does not depend on which file was read first."""
    numbers = [int(column[position]) for name, column in steps.columns.items() if name != "resource"]
    attributes = resources[int(steps.columns["resource"][position])].attributes
    return numbers, repr((steps.composition[position], attributes))


# --- its tables ---------------------------------------------------------------------------------------------


def _tables_of(life: _Life, findings: Findings) -> Plain:
    """Of batches that the steps tell, or else of what the requests tell of them."""
    columns = life.steps.columns
    times = StepTimes(columns["step"], columns["scheduled"], columns["ready"])
    rebuilt = rebuild(
        life.name, times.steps.tolist(), times.scheduled.tolist(), life.steps.composition, findings
    )  # fmt: skip
    known = match_requests(life.name, rebuilt, life.requests, findings)
    told = told_token_times(life.name, known, findings)
    models = [_text(one, names.MODEL) or "" for one in life.resources]
    served = models[columns["resource"][0]] if len(life.steps) else ""
    models_of = [served if one.span is None else models[one.span.resource] for one in known]
    requests = request_table(life.name, known, models_of, times, first_tokens(told))
    tables = {
        "replicas": _replica_table(life, times, [one.arrival for one in known]),
        "requests": requests,
        "gpu": gpu_table(life.name, life.samples, findings),
    }
    if any(one is not None for one in life.steps.composition):
        return {**tables, **_rebuilt_tables(life, times, rebuilt, known, told)}
    if len(life.steps):
        return {**tables, **_summed_tables(life, times, requests, known, told)}
    kept = len(life.requests) / sum(1.0 / one.kept for one in life.requests)
    block_size = _integer(life.resources[life.requests[0].resource], names.BLOCK_SIZE) or 0
    return {**tables, **estimated_tables(life.name, requests, told, kept=kept, block_size=block_size)}


def _rebuilt_tables(
    life: _Life, times: StepTimes, rebuilt: Rebuilt, known: Sequence[KnownRequest], told: TokenTimes
) -> Plain:
    """Where batches are known, at least in some stretches."""
    positions = np.zeros(len(rebuilt.requests), dtype=np.int64)
    for position, one in enumerate(known):
        if one.seen is not None:
            positions[one.seen.index] = position
    rows = residency_columns(rebuilt, positions, times.steps)
    untold = told.untold(len(known))
    return {
        "steps": _step_table(life),
        "residency": _residency_table(life, times, rows, known),
        "gaps": gap_table(life.name, [one.name for one in known], [told, seen_token_times(rows, untold, times)], times),
        "evictions": _eviction_table(life.name, rebuilt, positions, known),
        "coverage": _coverage_table(life.name, rebuilt, times, life.steps.columns["dropped"]),
    }


def _summed_tables(
    life: _Life, times: StepTimes, requests: pa.Table, known: Sequence[KnownRequest], told: TokenTimes
) -> Plain:
    """Where steps tell no more of batches than their sums, and requests who may have been in them."""
    rows_of, stations = told_stations(requests)
    names_of = [one.name for one in known]
    tables = {"steps": _step_table(life), "coverage": _sums_coverage(life, times, requests)}
    if not len(stations):
        return {**tables, "gaps": gap_table(life.name, names_of, [told], times, mean_gaps(requests, told))}
    clock = known_clock(stations, times.scheduled, times.ready)
    rows = reconstruct(stations, clock, times.steps, life.steps.columns["prefill_tokens"]).of_requests(rows_of)
    untold = told.untold(len(known))
    return {
        **tables,
        "residency": _residency_table(life, times, rows, known),
        "gaps": gap_table(life.name, names_of, [told, seen_token_times(rows, untold, times)], times),
    }


def _residency_table(life: _Life, times: StepTimes, rows: ResidencyColumns, known: Sequence[KnownRequest]) -> pa.Table:
    block_sizes = np.array([_integer(one, names.BLOCK_SIZE) or 0 for one in life.resources], dtype=np.int64)
    block_size = block_sizes[life.steps.columns["resource"][np.searchsorted(times.steps, rows.first_step)]]
    return residency_table(life.name, rows, [one.name for one in known], [one.tenant for one in known], block_size)


def _replica_table(life: _Life, times: StepTimes, arrivals: Sequence[int]) -> pa.Table:
    """A row for each configuration, from its first step on."""
    resource = life.steps.columns["resource"]
    numbers, first = np.unique(resource, return_index=True)
    order = np.argsort(first)
    chosen, since = numbers[order].tolist(), times.scheduled[first[order]].tolist()
    if not chosen:  # requests only
        chosen, since = [life.requests[0].resource], [min(arrivals)]
    told = (life.resources[number].attributes.get(names.SINCE) for number in chosen)
    since = [one if type(one) is int and 0 <= one < LATEST else seen for one, seen in zip(told, since, strict=True)]
    columns: dict[str, Column] = {"replica": [life.name] * len(chosen), "since": since}
    for column, name in RESOURCE_COLUMNS.items():
        kind = TABLES["replicas"].field(column).type
        read = (
            _integer if pa.types.is_int64(kind) else _text if pa.types.is_dictionary(kind)
            else _flag if pa.types.is_boolean(kind) else _number
        )  # fmt: skip
        columns[column] = [read(life.resources[number], name) for number in chosen]
    columns["engine"] = [
        said or engine_of(life.resources[number].attributes) or None
        for said, number in zip(columns["engine"], chosen, strict=True)
    ]
    return plain_table("replicas", columns, len(chosen))


def _step_table(life: _Life) -> pa.Table:
    columns = life.steps.columns
    resource = columns["resource"]
    device = columns["device_ns"]
    given: dict[str, Column] = {name: columns[name] for name in TABLES["steps"].names if name in columns}
    given |= {
        "replica": same(life.name, len(life.steps)),
        "dispatched": columns["scheduled"] + columns["dispatch_delay"],
        "device_ns": pa.array(device, mask=device == NOT_MEASURED),
    }
    for column, name in (("kv_total", names.KV_TOTAL), ("budget", names.MAX_NUM_BATCHED_TOKENS)):
        given[column] = pa.array([_integer(one, name) for one in life.resources], pa.int64()).take(pa.array(resource))
    return plain_table("steps", given, len(life.steps))


def _eviction_table(replica: str, rebuilt: Rebuilt, positions: Ints, known: Sequence[KnownRequest]) -> pa.Table:
    """``positions[i]`` is where request i of ``rebuilt`` stands among the known requests."""
    rows = np.array(rebuilt.evictions, dtype=np.int64).reshape(len(rebuilt.evictions), 4)
    taker, owner = (np.where(who < 0, -1, np.append(positions, -1)[who]) for who in (rows[:, 1], rows[:, 2]))
    names_of, tenants = [one.name for one in known], [one.tenant for one in known]
    columns: dict[str, Column] = {
        "replica": same(replica, len(rows)),
        "step": rows[:, 0],
        "evicting_request": names_at(names_of, taker),
        "owner_request": names_at(names_of, owner),
        "owner_tenant": names_at(tenants, owner),
        "blocks": rows[:, 3],
    }
    return plain_table("evictions", columns, len(rows))


def _coverage_table(replica: str, rebuilt: Rebuilt, times: StepTimes, dropped: Ints) -> pa.Table:
    """Stretches in which every batch is known (fidelity 3), and what lies between.

    There, batches are not known: steps that were seen give sums (2), else only requests tell anything (1). Records
    dropped count where the counter was seen to have risen: in the gap, if there is one.
    """
    rows = []
    for one in rebuilt.stretches:
        seen = one.last - one.first + 1
        if one.known:
            start, end = times.scheduled[one.first], times.ready[one.last]
            rise = dropped[one.last] - dropped[one.first]
        else:
            before, after = one.first - 1, min(one.last + 1, len(dropped) - 1)
            start = times.ready[before] if before >= 0 else times.scheduled[one.first]
            end = times.scheduled[after] if after > one.last else times.ready[one.last]
            rise = dropped[after] - (dropped[before] if before >= 0 else dropped[0])
        fidelity = FIDELITY_BATCHES if one.known else FIDELITY_SUMS if seen else FIDELITY_REQUESTS
        rows.append((replica, int(start), int(end), fidelity, seen, one.lost, max(int(rise), 0), 1.0))
    columns = dict(zip(TABLES["coverage"].names, zip(*rows, strict=True), strict=False)) if rows else {}
    return plain_table("coverage", columns, len(rows))


def _sums_coverage(life: _Life, times: StepTimes, requests: pa.Table) -> pa.Table:
    """One stretch, of steps whose batches are not told; ``sampled_share``: of the tokens that the steps decoded, those
    that requests tell of."""
    if not len(times.steps):
        return plain_table("coverage", {}, 0)
    lost = int(times.steps[-1] - times.steps[0]) + 1 - len(times.steps)
    dropped = int(np.ptp(life.steps.columns["dropped"]))
    start, end = int(times.scheduled[0]), int(times.ready[-1])
    decoded = int(life.steps.columns["decode_tokens"].sum())
    # A request's first token comes with its prompt. Where steps are missing, so are tokens of theirs.
    told = int(np.maximum(requests["output_tokens"].fill_null(0).to_numpy() - 1, 0).sum())
    kept = min(told / decoded, 1.0) if decoded else 1.0
    row = (life.name, start, end, FIDELITY_SUMS, len(times.steps), lost, dropped, kept)
    return plain_table(
        "coverage", {name: [value] for name, value in zip(TABLES["coverage"].names, row, strict=True)}, 1
    )


def _integer(resource: Resource, name: str) -> int | None:
    value = resource.attributes.get(name)
    return value if type(value) is int and 0 <= value < MOST else None


def _text(resource: Resource, name: str) -> str | None:
    value = resource.attributes.get(name)
    return value if isinstance(value, str) and value else None


def _flag(resource: Resource, name: str) -> bool | None:
    value = resource.attributes.get(name)
    return value if isinstance(value, bool) else None


def _number(resource: Resource, name: str) -> float | None:
    value = resource.attributes.get(name)
    return float(value) if isinstance(value, int | float) and abs(value) < MOST else None
