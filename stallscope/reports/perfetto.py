"""A trace as a file for ui.perfetto.dev: the face for who wants to scroll through every request, step and stall.

A process a replica; in it incidents and stalled waits on top, then steps and counters, then requests, waiting or in a
slot of the batch. Packets are written some thousands at a time and never all held. Names from the trace are hostile
input: they come out on one line, shortened where they are titles.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from stallscope.diagnosis.incidents import measure_waits
from stallscope.diagnosis.model import Diagnosis, Incident
from stallscope.diagnosis.replica import Replica, replicas
from stallscope.errors import UsageError
from stallscope.trace import Trace
from stallscope.trace.select import span
from stallscope.views import words
from stallscope.views.tracks import Stalls, Stays, Steps, engine, lanes, stalls, stays

_PACKETS = 4096  # held before they are written
_ROWS = 1 << 16  # of columns, turned into Python's numbers at a time
_LONGEST_NAME, _LONGEST_TITLE = 64, 200
# Numbers of Perfetto's enumerations, which are part of its format.
_BEGIN, _END, _COUNTER = 1, 2, 4  # TrackEvent.Type
_FIRST_WORDS, _NEEDS_WORDS = 1, 2  # TracePacket.SequenceFlags
_BY_RANK = 3  # TrackDescriptor.ChildTracksOrdering
_BOOT_TIME, _REAL_TIME = 6, 1  # BuiltinClock: what times are taken for, and what a viewer can show

Column = NDArray[Any]
Arrows = Mapping[int, Sequence[int]]  # ids of arrows by the request that they come from


class Word(str):
    """A text that many packets share: it is written once, and meant by its number from then on."""


def write_perfetto(
    trace: Trace, diagnosis: Diagnosis | None, file: IO[bytes], progress: Callable[[float], None] | None = None
) -> None:
    """Writes all replicas of a trace, with the incidents of its diagnosis if there is one.

    ``progress`` hears the share of the work that is done, in [0, 1]. Raises UsageError where ``perfetto`` is missing.
    """
    if find_spec("perfetto") is None:
        raise UsageError("a Perfetto trace needs the package perfetto, which is not installed: pip install perfetto")
    packets = Packets(file)
    packets.clock(span(trace)[0])
    count = len(set(trace.columns("steps", ["replica"])["replica"].to_pylist()))
    for number, replica in enumerate(replicas(trace)):
        incidents = _of_replica(diagnosis, replica.name) if diagnosis is not None else None
        for done in _write_replica(packets, replica, number + 1, incidents):
            if progress is not None:
                progress((number + done) / count)
    packets.write()


def _of_replica(diagnosis: Diagnosis, replica: str) -> Diagnosis:
    """The diagnosis with the incidents of one replica only."""
    return replace(diagnosis, incidents=tuple(one for one in diagnosis.incidents if one.replica == replica))


def _write_replica(packets: Packets, replica: Replica, number: int, diagnosis: Diagnosis | None) -> Iterator[float]:
    """Writes one replica, and yields the share of it that is done."""
    tracks = Tracks(packets, replica, number)
    titles = Titles(replica)
    waiting, batch = stays(replica)
    yield 0.1
    stalled = None
    if diagnosis is not None and diagnosis.incidents:
        stalled = stalls(replica, measure_waits(replica), diagnosis.incidents, batch)
        _write_incidents(packets, tracks, diagnosis)
        stalled_tracks = tracks.lanes("stalled waits", stalled.lane)
    yield 0.2
    steps, counters = engine(replica)
    _write_steps(packets, tracks.add("steps"), steps)
    for counter in counters:
        track = tracks.add(counter.name, counter=True)
        for time, value in _rows(counter.time_ns, counter.value):
            packets.count(track, time, value)
    yield 0.5
    to_waits = packets.arrows(stalled)
    from_waiting, from_batch = _arrows(stalled, to_waits)
    _write_stays(packets, tracks.lanes("waiting", waiting.lane), waiting, titles, from_waiting)
    yield 0.6
    _write_stays(packets, tracks.slots(batch.lane), batch, titles, from_batch)
    yield 0.9
    if stalled is not None:  # after what their arrows come from
        _write_stalls(packets, stalled_tracks, stalled, titles, to_waits)
    yield 1.0


# --- what is on the tracks ----------------------------------------------------------------------------------------


class Titles:
    """How requests are named on slices, and what is said of each beside its name."""

    def __init__(self, replica: Replica) -> None:
        columns = ("request", "tenant", "prompt_tokens", "output_tokens", "state", "finish_reason")
        table = replica.read_requests(columns)
        self._columns = {name: table[name].to_pylist() for name in columns}

    def tenant(self, request: int) -> Word:
        return _named(self._columns["tenant"][request])

    def title(self, request: int) -> str:
        return f"{_named(self._columns['request'][request])} · {self.tenant(request)}"

    def notes(self, request: int) -> dict[str, int | str]:
        """All that is known of the request by its code, names in full."""
        said = {name: column[request] for name, column in self._columns.items() if column[request] is not None}
        said["request"] = words.printable(said["request"])
        said |= {
            name: Word(words.printable(said[name])) for name in ("tenant", "state", "finish_reason") if name in said
        }
        return said


def _named(name: str | None) -> Word:
    """A name from the trace as it may stand in a title."""
    return Word(words.shortened(words.printable(name or ""), _LONGEST_NAME))


def _write_incidents(packets: Packets, tracks: Tracks, diagnosis: Diagnosis) -> None:
    incidents = sorted(diagnosis.incidents, key=lambda one: one.start_ns)
    begin, end = (np.array([getattr(one, name) for one in incidents]) for name in ("start_ns", "end_ns"))
    lane = lanes(begin, end)
    track = tracks.lanes("incidents", lane)
    for at in np.lexsort((begin, lane)).tolist():
        only = words.legible(replace(diagnosis, incidents=(incidents[at],), verdict=incidents[at].verdict))
        title = words.shortened(f"{only.verdict}: {words.headline(only)}", _LONGEST_TITLE)
        packets.begin(track[lane[at]], incidents[at].start_ns, title, Word("incident"), _said_of(only.incidents[0]))
        packets.end(track[lane[at]], incidents[at].end_ns)


def _said_of(incident: Incident) -> dict[str, float | str]:
    return {
        "verdict": str(incident.verdict),
        "confidence": str(incident.confidence),
        "mechanism": incident.mechanism or "",
        "culprits": ", ".join(one.tenant for one in incident.culprits),
        "victims": ", ".join(one.tenant for one in incident.victims),
        "lost_s": incident.lost_s,
        "reasons": "; ".join(incident.reasons),
    }


def _write_steps(packets: Packets, track: int, steps: Steps) -> None:
    columns = (steps.begin, steps.end, steps.step, steps.prefill_tokens, steps.decode_tokens, steps.batch_size)
    for begin, end, step, prefill, decode, size in _rows(*columns):
        title = ", ".join(f"{what} {tokens}" for what, tokens in (("prefill", prefill), ("decode", decode)) if tokens)
        notes = {"step": step, "prefill_tokens": prefill, "decode_tokens": decode, "batch_size": size}
        packets.begin(track, begin, title or "nothing", Word("step"), notes)
        packets.end(track, end)


def _write_stays(packets: Packets, track: Sequence[int], stays: Stays, titles: Titles, arrows: Arrows) -> None:
    """A slice a stay, and within it one for each thing that the request was doing."""
    pieces = _rows(*vars(stays.pieces).values())
    count = np.diff(stays.first_piece)
    for lane, request, begin, end, within in _rows(stays.lane, stays.request, stays.begin, stays.end, count):
        at, tenant = track[lane], titles.tenant(request)
        title, notes = titles.title(request), titles.notes(request)
        packets.begin(at, begin, title, tenant, notes, alike=tenant, out=arrows.get(request, ()))
        for _ in range(within):
            start, stop, doing, tokens = next(pieces)
            packets.begin(at, start, Word(doing), tenant, {"tokens": tokens} if tokens else {})
            packets.end(at, stop)
        packets.end(at, end)


def _write_stalls(packets: Packets, track: Sequence[int], stalled: Stalls, titles: Titles, arrows: Column) -> None:
    """A slice a wait, and within it, since the culprit's request was there, one for what it waited for."""
    for lane, request, begin, end, metric, cause, _, since, arrow in _rows(*vars(stalled).values(), arrows):
        at, tenant = track[lane], titles.tenant(request)
        notes = titles.notes(request) | {"metric": Word(metric)}
        packets.begin(at, begin, titles.title(request), tenant, notes, alike=tenant)
        if arrow:
            packets.begin(
                at, since, f"for {titles.title(cause)}", titles.tenant(cause), titles.notes(cause), into=arrow
            )
            packets.end(at, end)
        packets.end(at, end)


def _arrows(stalled: Stalls | None, ids: Column) -> tuple[Arrows, Arrows]:
    """The arrows that come from waiting requests and from those in the batch; ``ids``: each wait's, 0 for none."""
    found: tuple[dict[int, list[int]], ...] = defaultdict(list), defaultdict(list)
    if stalled is not None:
        for cause, runs, arrow in _rows(stalled.cause, stalled.cause_runs, ids):
            if arrow:
                found[runs][cause].append(arrow)
    return found[0], found[1]


def _rows(*columns: Column) -> Iterator[tuple[Any, ...]]:
    """The rows of columns as Python's own values."""
    for low in range(0, len(columns[0]), _ROWS):
        yield from zip(*(column[low : low + _ROWS].tolist() for column in columns), strict=True)


# --- how it is written --------------------------------------------------------------------------------------------


class Tracks:
    """The tracks of one replica, in the order in which they are added."""

    def __init__(self, packets: Packets, replica: Replica, number: int) -> None:
        self._packets = packets
        self._process = packets.track(_named(replica.name), process=number)
        self._rank = 0

    def add(self, name: str, *, counter: bool = False) -> int:
        self._rank += 1
        return self._packets.track(name, self._process, self._rank, counter=counter)

    def lanes(self, name: str, lane: Column) -> list[int]:
        """As many tracks as there are lanes; of one name, a viewer shows them as one."""
        self._rank += 1
        count = int(lane.max(initial=-1)) + 1
        return [self._packets.track(name, self._process, self._rank) for _ in range(count)]

    def slots(self, lane: Column) -> list[int]:
        """A track for each lane, below one of their own."""
        batch = self.add("batch")
        return [self._packets.track(f"slot {one}", batch, one) for one in range(1, int(lane.max(initial=-1)) + 2)]


class Packets:
    """Perfetto's packets, numbered words and ids on their way into a file."""

    def __init__(self, file: IO[bytes]) -> None:
        from perfetto.trace_builder.proto_builder import TraceProtoBuilder

        self._file = file
        self._new_builder = TraceProtoBuilder
        self._builder = TraceProtoBuilder()
        self._held = 0
        self._tracks = 0
        self._arrows = 0
        self._words: dict[tuple[str, str], int] = {}
        self._packet().sequence_flags = _FIRST_WORDS

    def write(self) -> None:
        """Writes what is held: traces, one after the other, are one."""
        self._file.write(self._builder.serialize())
        self._builder, self._held = self._new_builder(), 0

    def clock(self, time_ns: int) -> None:
        """Says, once, that times are ns since the epoch, so that a viewer can show the time of day."""
        snapshot = self._packet().clock_snapshot
        for clock in (_BOOT_TIME, _REAL_TIME):
            snapshot.clocks.add(clock_id=clock, timestamp=time_ns)

    def track(self, name: str, parent: int = 0, rank: int = 0, *, counter: bool = False, process: int = 0) -> int:
        """A new track; its children are shown in the order of their ranks."""
        self._tracks += 1
        track = self._packet().track_descriptor
        track.uuid = self._tracks
        track.child_ordering = _BY_RANK
        if process:
            track.process.pid, track.process.process_name = process, name
        else:
            track.parent_uuid, track.name, track.sibling_order_rank = parent, name, rank
        if counter:
            track.counter.SetInParent()
        return self._tracks

    def arrows(self, stalled: Stalls | None) -> Column:
        """A new id for each wait that has a cause, 0 for the others."""
        if stalled is None:
            return np.zeros(0, dtype=np.int64)
        caused = stalled.cause >= 0
        ids = np.where(caused, self._arrows + np.cumsum(caused), 0)
        self._arrows += int(caused.sum())
        return ids

    def begin(
        self,
        track: int,
        time_ns: int,
        title: str,
        category: Word,
        notes: Mapping[str, int | float | str],
        *,
        alike: Word | None = None,
        out: Sequence[int] = (),
        into: int = 0,
    ) -> None:
        """Begins a slice. Slices that are ``alike`` get one colour; arrows lead ``out`` of it, and one ``into`` it."""
        packet = self._packet(time_ns)
        packet.sequence_flags = _NEEDS_WORDS
        event = packet.track_event
        event.type, event.track_uuid = _BEGIN, track
        if isinstance(title, Word):
            event.name_iid = self._number(packet, "event_names", title)
        else:
            event.name = title
        event.category_iids.append(self._number(packet, "event_categories", category))
        if alike is not None:
            event.correlation_id_str_iid = self._number(packet, "correlation_id_str", alike)
        event.flow_ids.extend(out)
        if into:
            event.terminating_flow_ids.append(into)
        for name, value in notes.items():
            note = event.debug_annotations.add(name_iid=self._number(packet, "debug_annotation_names", name))
            if isinstance(value, Word):
                note.string_value_iid = self._number(packet, "debug_annotation_string_values", value)
            elif isinstance(value, str):
                note.string_value = value
            elif isinstance(value, int):
                note.int_value = value
            else:
                note.double_value = value

    def end(self, track: int, time_ns: int) -> None:
        """Ends the slice that was begun last on a track."""
        event = self._packet(time_ns).track_event
        event.type, event.track_uuid = _END, track

    def count(self, track: int, time_ns: int, value: int) -> None:
        event = self._packet(time_ns).track_event
        event.type, event.track_uuid, event.counter_value = _COUNTER, track, value

    def _packet(self, time_ns: int | None = None) -> Any:
        if self._held == _PACKETS:
            self.write()
        self._held += 1
        packet = self._builder.add_packet()
        packet.trusted_packet_sequence_id = 1
        if time_ns is not None:
            packet.timestamp = time_ns
        return packet

    def _number(self, packet: Any, table: str, word: str) -> int:
        """The number of a word, which ``packet`` brings along where it is the first to use it."""
        known = self._words.get((table, word))
        if known is None:
            known = self._words[table, word] = len(self._words) + 1
            entry = getattr(packet.interned_data, table).add(iid=known)
            if hasattr(entry, "str"):
                entry.str = word.encode()
            else:
                entry.name = word
        return known
