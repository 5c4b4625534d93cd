"""Reads a Perfetto file back with Perfetto's own protos, as its trace processor does."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TrackEvent


@dataclass
class Slice:
    """``depth``: how many slices it lies in; ``out`` and ``into``: ids of arrows."""

    track: str
    begin: int
    name: str
    category: str
    alike: str
    notes: dict[str, Any]
    depth: int
    out: list[int]
    into: list[int]
    end: int = -1


@dataclass
class Read:
    """What a viewer sees; tracks are named by their path from the process down."""

    clocks: list[dict[int, int]] = field(default_factory=list)
    processes: list[str] = field(default_factory=list)
    slices: list[Slice] = field(default_factory=list)
    counters: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))

    def on(self, track: str, depth: int = 0) -> list[Slice]:
        return [one for one in self.slices if f"/{track}" in one.track and one.depth == depth]


def read_perfetto(path: Path) -> Read:
    """The file as its packets say, sorted by time as a trace processor sorts; fails where a slice does not nest."""
    trace = Trace.FromString(path.read_bytes())
    found = Read()
    names: dict[int, str] = {}
    words: dict[str, dict[int, str]] = defaultdict(dict)
    events: list[tuple[int, Any, dict[str, Any]]] = []
    for packet in trace.packet:
        assert packet.trusted_packet_sequence_id == 1
        for table in ("event_names", "event_categories", "debug_annotation_names"):
            words[table] |= {entry.iid: entry.name for entry in getattr(packet.interned_data, table)}
        for table in ("debug_annotation_string_values", "correlation_id_str"):
            words[table] |= {entry.iid: entry.str.decode() for entry in getattr(packet.interned_data, table)}
        if packet.HasField("clock_snapshot"):
            found.clocks.append({clock.clock_id: clock.timestamp for clock in packet.clock_snapshot.clocks})
        if packet.HasField("track_descriptor"):
            track = packet.track_descriptor
            assert track.uuid not in names
            parent = names[track.parent_uuid] if track.parent_uuid else ""
            names[track.uuid] = f"{parent}/{track.process.process_name or track.name}"
            if track.HasField("process"):
                found.processes.append(track.process.process_name)
        if packet.HasField("track_event"):
            events.append((packet.timestamp, packet.track_event, _said(packet.track_event, words)))
    stacks: dict[int, list[Slice]] = defaultdict(list)
    for time, event, said in sorted(events, key=lambda one: one[0]):
        track, stack = names[event.track_uuid], stacks[event.track_uuid]
        if event.type == TrackEvent.TYPE_COUNTER:
            found.counters[track].append((time, event.counter_value))
        elif event.type == TrackEvent.TYPE_SLICE_BEGIN:
            begun = Slice(track, time, depth=len(stack), **said)
            stack.append(begun)
            found.slices.append(begun)
        else:
            stack.pop().end = time
    assert not any(stacks.values())
    return found


def _said(event: Any, words: dict[str, dict[int, str]]) -> dict[str, Any]:
    notes = {}
    for note in event.debug_annotations:
        kind = note.WhichOneof("value")
        value = getattr(note, kind)
        by_number = kind == "string_value_iid"
        notes[words["debug_annotation_names"][note.name_iid]] = (
            words["debug_annotation_string_values"][value] if by_number else value
        )
    return {
        "name": words["event_names"][event.name_iid] if event.name_iid else event.name,
        "category": ",".join(words["event_categories"][number] for number in event.category_iids),
        "alike": words["correlation_id_str"].get(event.correlation_id_str_iid, ""),
        "notes": notes,
        "out": list(event.flow_ids),
        "into": list(event.terminating_flow_ids),
    }
