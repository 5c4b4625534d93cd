"""One incident as a case to be judged: what its victims lost, to whom, and who of those was not as usual."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from stallscope.diagnosis.evidence import share
from stallscope.diagnosis.incidents import Waits, Window
from stallscope.diagnosis.load import Loads
from stallscope.diagnosis.model import Confidence, Verdict
from stallscope.diagnosis.partition import Party
from stallscope.diagnosis.replica import Replica
from stallscope.diagnosis.suspects import (
    CACHE_EVICTION,
    CONDITIONS,
    QUEUES,
    STEP_FIXED,
    Suspect,
    excess_charges,
    find_suspect,
    pass_on_head_of_line,
    pass_on_refills,
)

MOST_OF_IT, FAR_MORE = 0.6, 3.0  # what a hog has of a resource, and in relation to the next one


@dataclass(frozen=True, eq=False)
class Case:
    """A window and its charges above usual (``excess``: wait, victim, holder, mechanism, ns).

    ``everything`` has in addition what a step costs whatever is in it: part of the loss, but no tenant's doing and no
    fault. ``suspects`` cost others something, the most first; ``own`` cost their own tenant. ``unusual``: who had
    changed.
    """

    replica: Replica
    waits: Waits
    window: Window
    loads: Loads
    healthy: pd.DataFrame
    everything: pd.DataFrame
    excess: pd.DataFrame
    suspects: tuple[Suspect, ...]
    own: tuple[Suspect, ...]
    unusual: frozenset[int]

    @property
    def charged_ns(self) -> float:
        return float(self.excess["ns"].sum())

    @property
    def lost_ns(self) -> float:
        return float(self.everything["ns"].sum())

    @property
    def breaks_slo(self) -> bool:
        """Whether a wait was longer than an SLO allows."""
        return bool(self.waits.table.loc[self.window.waits, "promised"].any())

    @property
    def own_share(self) -> float:
        """Share of what is charged that victims' own tenants are charged."""
        own = self.excess["holder"] == self.excess["victim"]
        return share(float(self.excess.loc[own, "ns"].sum()), self.charged_ns)

    @property
    def backlog(self) -> float:
        """Share that tenants as usual are charged for queueing before one another.

        After a stall that is part of the loss, and no cause of it.
        """
        queued = self.excess["mechanism"].isin(QUEUES) & (self.excess["holder"] >= 0)
        queued &= ~self.excess["holder"].isin(self.unusual)
        return share(float(self.excess.loc[queued, "ns"].sum()), self.charged_ns)

    @property
    def cold_share(self) -> float:
        """Share that is charged for beginnings of prompts that the cache lacked, through nobody's doing."""
        cold = (self.excess["mechanism"] == CACHE_EVICTION) & (self.excess["holder"] == int(Party.ENGINE))
        return share(float(self.excess.loc[cold, "ns"].sum()), self.charged_ns)

    @property
    def of_conditions(self) -> pd.DataFrame:
        """The charges for what requests themselves had to wait for: a grammar, KV blocks from elsewhere, and such."""
        return self.excess[self.excess["mechanism"].isin(CONDITIONS)]

    @property
    def condition_share(self) -> float:
        """Share of what is charged that these are."""
        return share(float(self.of_conditions["ns"].sum()), self.charged_ns)

    def share_of(self, party: Party) -> float:
        """Share of what is charged that is charged to somebody who is no tenant."""
        mine = self.excess["holder"] == int(party)
        return share(float(self.excess.loc[mine, "ns"].sum()), self.charged_ns)


@dataclass(frozen=True)
class Finding:
    """A judgement on a case. ``culprits``: the worst first; ``restored``, ``shapley``: by tenant, where replayed."""

    verdict: Verdict
    confidence: Confidence
    culprits: tuple[Suspect, ...]
    mechanism: str | None
    reasons: tuple[str, ...]
    restored: dict[int, float]
    shapley: dict[int, float]
    group: str = ""


def open_case(
    replica: Replica, waits: Waits, window: Window, loads: Loads, healthy: pd.DataFrame, usual: pd.Series[float]
) -> Case:
    """``healthy``: the waits that are usual; ``usual``: what holders are charged for those (``suspects``)."""
    everything = pass_on_refills(excess_charges(waits, window, usual), replica, waits, window)
    excess = everything[everything["mechanism"] != STEP_FIXED]
    unusual = frozenset(loads.changes.during(window.start, window.end))
    excess = pass_on_head_of_line(excess, waits, window, set(unusual))
    own = excess["holder"] == excess["victim"]
    suspects, selves = (
        sorted(
            (find_suspect(part, tenant, loads, window) for tenant in np.unique(part["holder"]).tolist() if tenant >= 0),
            key=lambda suspect: -suspect.caused_ns,
        )
        for part in (excess[~own], excess[own])
    )
    return Case(replica, waits, window, loads, healthy, everything, excess, tuple(suspects), tuple(selves), unusual)


def dominates(case: Case, suspect: Suspect) -> bool:
    """Whether a tenant takes most of what it is charged for, and far more than anybody else."""
    loads = case.loads.of_all(suspect.resource, case.window.start, case.window.end)
    levels = sorted((load.level for load in loads), reverse=True)
    mine, second = loads[suspect.tenant].level, levels[1] if len(levels) > 1 else 0.0
    return mine == levels[0] and mine >= MOST_OF_IT * sum(levels) and mine >= FAR_MORE * second


def reason_for(case: Case, suspect: Suspect) -> str:
    """What a tenant did that it usually does not, as a sentence; its load, where that is nothing in particular."""
    load, change, tenant = suspect.load, suspect.change, case.replica.tenants[suspect.tenant]
    if change is None:
        return f"{tenant} took {load.level:.0%} of the {suspect.resource}, usually {load.usual:.1%}"
    many = f"{change.count:,} request{'s' if change.count != 1 else ''}"
    what = many if change.above <= 0 else f"{many} with {change.above:,.0f} {change.of} or more"
    none = "it sends none at other times" if change.above <= 0 else "at other times it sends none as long"
    usually = none if change.expected < 0.5 else f"usually it is {change.expected:,.0f}"
    seconds = (change.end - change.start) / 1e9
    within = f" in {seconds:,.{0 if seconds >= 1 else 1}f} s" if change.count > 1 else ""
    return f"{tenant} sent {what}{within}; {usually}"
