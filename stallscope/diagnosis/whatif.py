"""What would have been in a whole trace, had something been otherwise: one question, answered by replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np

from stallscope.diagnosis.changes import find_changes
from stallscope.diagnosis.incidents import Window, find_episodes, find_windows, measure_waits, not_usual
from stallscope.diagnosis.load import Loads
from stallscope.diagnosis.model import Intervention, InterventionKind, ReplayCheck
from stallscope.diagnosis.replay.interventions import DRAWS, IncidentReplays
from stallscope.diagnosis.replay.replayer import prepare_replay
from stallscope.diagnosis.replay.run import Outcome
from stallscope.diagnosis.replica import Replica, replicas
from stallscope.diagnosis.suspects import healthy_waits
from stallscope.errors import InconclusiveError, UsageError
from stallscope.trace import Trace
from stallscope_engine.config import EngineConfig


@dataclass(frozen=True, slots=True)
class Question:
    """Tenants as usual, tenants or requests not there, or settings of the engine (name and text): one of the four.

    Raises UsageError where it is none of them, or several.
    """

    usual: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    without_requests: tuple[str, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if sum(map(bool, (self.usual, self.without, self.without_requests, self.settings))) != 1:
            raise UsageError(
                "ask one thing: --usual TENANT, --without TENANT, --without-request ID, or --set NAME=VALUE"
            )


@dataclass(frozen=True, slots=True)
class WhatIf:
    """The answer, and how well the recording could be replayed unchanged."""

    answer: Intervention
    check: ReplayCheck


def what_if(trace: Trace, question: Question, progress: Callable[[float], None] | None = None) -> WhatIf:
    """Replays a trace of one replica with what the question changes; its predictions are medians and tails.

    ``progress`` hears the share of the replays that are done, in [0, 1]. Raises UsageError where the question is none
    for this trace, InconclusiveError where it can't be replayed.
    """
    found = list(replicas(trace))
    if len(found) != 1:
        names = ", ".join(one.name for one in found) or "none"
        raise UsageError(f"what if is asked of one replica at a time: choose with --replica ({names})")
    replica = found[0]
    replays, check = _prepare(replica)
    tenants = [_tenant(replica, name) for name in (*question.usual, *question.without)]
    requests = [_request(replica, name) for name in question.without_requests]
    tenants += [int(replica.tenant_of_request[code]) for code in requests]
    kind, what, changed = _change(replays, question, tenants, requests)
    outcomes = []
    for done, draw in enumerate(DRAWS):
        for half, replayed in enumerate((replays.stretch.unchanged, changed), start=1):
            outcome = replayed(draw)
            if progress is not None:
                progress((done + half / 2) / len(DRAWS))
        outcomes.append(outcome)
    effect = replays.effect(outcomes, DRAWS, tenants)
    return WhatIf(replays.describe(kind, what, sorted(set(tenants)), effect, medians=True), check)


def _prepare(replica: Replica) -> tuple[IncidentReplays, ReplayCheck]:
    changes = find_changes(replica)
    waits = measure_waits(replica, changes=changes)
    episodes = find_episodes(waits)
    loads = Loads(replica, not_usual(waits, episodes, replica.timeline_ns), changes)
    healthy = healthy_waits(waits, find_windows(waits, episodes, replica))
    replayer = prepare_replay(replica)
    if not replayer.trusted:
        raise InconclusiveError(f"{replica.name} can't be replayed: {replayer.check.reason}")
    whole = Window(int(replica.timeline.before[0]), int(replica.timeline.end[-1]), np.zeros(0, dtype=np.int64))
    return replayer.incidents([whole], waits, healthy, loads)[0], replayer.check


def _change(
    replays: IncidentReplays, question: Question, tenants: Sequence[int], requests: Sequence[int]
) -> tuple[InterventionKind, str, Callable[[int], Outcome]]:
    """What the question changes, in words, and the replay of a draw with it."""
    stretch = replays.stretch
    if question.usual:
        _check_usual(replays, tenants)
        return InterventionKind.USUAL, f"{', '.join(question.usual)} as usual", partial(stretch.usual, tenants)
    if question.without:
        what = f"without {', '.join(question.without)}"
        return InterventionKind.WITHOUT_TENANT, what, partial(stretch.without, tenants, ())
    if question.without_requests:
        what = f"without {', '.join(question.without_requests)}"
        return InterventionKind.WITHOUT_REQUEST, what, partial(stretch.without, (), requests)
    config = _changed(replays.history.config, question.settings)
    what = ", ".join(f"{name}={value}" for name, value in question.settings)
    if rejected := replays.rejected_by(config):
        total = len(stretch.plan.requests)
        raise UsageError(f"--set {what}: {rejected} of {total} recorded requests would be rejected; give more room")
    return InterventionKind.REMEDY, what, partial(stretch.configured, config)


def _check_usual(replays: IncidentReplays, tenants: Sequence[int]) -> None:
    for tenant in tenants:
        if not replays.stretch.usual_is_known(tenant):
            name = replays.history.replica.tenants[tenant]
            raise InconclusiveError(
                f"what is usual for {name} can't be told, as hardly any time of the trace is calm: ask --without {name}"
            )


def _tenant(replica: Replica, name: str) -> int:
    if name not in replica.tenants:
        raise UsageError(f"no tenant {name!r} in the trace, but {', '.join(replica.tenants[:10])}")
    return replica.tenants.index(name)


def _request(replica: Replica, name: str) -> int:
    codes = np.flatnonzero((replica.requests["request"] == name).to_numpy())
    if not len(codes):
        raise UsageError(f"no request {name!r} in the trace: analyze --format json names those that did most")
    return int(codes[0])


def _changed(config: EngineConfig, settings: Sequence[tuple[str, str]]) -> EngineConfig:
    """The configuration with settings given as text; UsageError where one is unknown or doesn't fit."""
    known = {field.name: getattr(config, field.name) for field in fields(config)}
    del known["model"]  # what another one's steps would cost is not in the recording
    values: dict[str, object] = {}
    for name, text in settings:
        if name not in known:
            raise UsageError(f"no setting {name!r}; there are {', '.join(known)}")
        values[name] = _read(name, text, known[name])
    try:
        return replace(config, **values)  # type: ignore[arg-type]
    except ValueError as error:
        raise UsageError(f"--set: {error}") from error


def _read(name: str, text: str, now: object) -> object:
    """``text`` as a value of the kind that the setting has now."""
    try:
        if isinstance(now, bool):
            return {"true": True, "false": False}[text.lower()]
        return type(now)(text) if isinstance(now, int | float) else text
    except (KeyError, ValueError) as error:
        kind = "true or false" if isinstance(now, bool) else "a number"
        raise UsageError(f"--set {name}={text}: must be {kind}; it was {now} in the recording") from error
