"""What a page's parts draw from: a recording, seen from an address."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from stallscope.asking import Asked
from stallscope.diagnosis.model import Diagnosis, Incident
from stallscope.diagnosis.replica import Replica
from stallscope.errors import UsageError
from stallscope.reports.figures import Looks, Span
from stallscope.views import words
from stallscope.views.colours import colours
from stallscope.views.focus import around
from stallscope_dash.address import Address
from stallscope_dash.recording import Recording


@dataclass(frozen=True)
class Scene:
    """The recording, and what is looked at in it; what the address leaves open is chosen here."""

    recording: Recording
    address: Address

    @property
    def diagnosis(self) -> Diagnosis | None:
        return self.recording.diagnosis

    @cached_property
    def replica_name(self) -> str:
        """The address's, or that of its incident, or of the worst one, or the first."""
        if self.address.replica:
            return self.address.replica
        if self.incident is not None:
            return self.incident.replica
        if not self.recording.names:
            raise UsageError(f"{self.recording.trace.source}: no engine steps in it; see `stallscope doctor`")
        return self.recording.names[0]

    @cached_property
    def replica(self) -> Replica:
        return self.recording.replica(self.replica_name)

    @cached_property
    def incident(self) -> Incident | None:
        """The address's incident, or the worst; None where it is not there, or nobody knows yet."""
        return self.diagnosis.incidents[self.number - 1] if self.diagnosis is not None and self.number else None

    @cached_property
    def number(self) -> int:
        """The incident's, from 1; 0 where it is not there, or nobody knows yet."""
        found = self.diagnosis.incidents if self.diagnosis is not None else ()
        number, at = self.address.incident, self.address.at
        if at is None and not number and self.address.replica:
            of_replica = [one for one, incident in enumerate(found, 1) if incident.replica == self.address.replica]
            return next(iter(of_replica), 0)
        if at is None:
            return max(number, 1) if number <= len(found) and found else 0
        there = [one for one, incident in enumerate(found, start=1) if incident.start_ns <= at <= incident.end_ns]
        return number if number in there else next(iter(there), 0)

    def to_incident(self, number: int, *, keeps_window: bool = False) -> str:
        """The query of an incident's page, on the same window or on its own: it is this one that is found there,
        whatever its number will be."""
        assert self.diagnosis is not None
        chosen = self.diagnosis.incidents[number - 1]
        middle = (chosen.start_ns + chosen.end_ns) // 2
        left = {} if keeps_window else {"replica": "", "since": None, "until": None}
        return self.address.search(incident=number, at=middle, **left)

    @cached_property
    def incidents(self) -> tuple[Incident, ...]:
        """All of the replica's, by harm."""
        found = self.diagnosis.incidents if self.diagnosis is not None else ()
        return tuple(one for one in found if one.replica == self.replica_name)

    @cached_property
    def span(self) -> Span:
        """All of the replica's time, ns."""
        timeline = self.replica.timeline
        return int(timeline.before[0]), int(timeline.end[-1])

    @cached_property
    def window(self) -> Span:
        """What charts show: what the address says, else all."""
        return self._within(self.span)

    @cached_property
    def asked(self) -> Asked | None:
        """The part of the recording that is looked at, for a job to read; None where that moves on."""
        whole, address = self.recording.asked, self.address
        if not self.recording.moves:
            return whole if self.window == self.span else _between(whole, *self.window)
        if address.since is None or address.until is None:
            return None
        return _between(whole, address.since, address.until)

    def to_stretch(self, since: int | None, until: int | None) -> str:
        """The query of the same page on another stretch of time, as far as there is a recording of it."""
        first, last = self.span
        start, end = (first if since is None else max(since, first)), (last if until is None else min(until, last))
        if start >= end:
            return self.address.search()
        whole = (start, end) == self.span
        return self.address.search(since=None if whole else start, until=None if whole else end)

    def to_question(self, question: str, attempt: int = 0) -> str:
        """The query of the same page that asks this, of a stretch of time that stands still."""
        if not self.recording.moves:
            return self.address.search(question=question, attempt=attempt)
        since, until = self.window
        return self.address.search(question=question, attempt=attempt, since=since, until=until)

    @cached_property
    def near(self) -> Span:
        """The same on an incident's page: what the address says, else a stretch around the incident."""
        return self._within(self.span if self.incident is None else around(self.incident, self.span))

    @cached_property
    def looks(self) -> Looks:
        """Of the replica's tenants."""
        return colours(self.replica.tenants)

    def _within(self, usual: Span) -> Span:
        start = usual[0] if self.address.since is None else max(self.address.since, self.span[0])
        end = usual[1] if self.address.until is None else min(self.address.until, self.span[1])
        return (start, end) if start < end else usual


def _between(asked: Asked, start_ns: int, end_ns: int) -> Asked:
    return replace(asked, since=words.iso(start_ns), until=words.iso(end_ns))
