"""Who of those that changed are one: many small newcomers that act alike are one culprit, not ten innocents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from stallscope.diagnosis.case import Case
from stallscope.diagnosis.changes import Change
from stallscope.diagnosis.suspects import Suspect, find_suspect

FEWEST_ALIKE = 3  # newcomers of one shape that count as one
ALIKE = 1.5  # their sizes differ by no larger factor


@dataclass(frozen=True, slots=True)
class ChangedParty:
    """One tenant that changed, or several newcomers that act alike, the one that cost most first; those are a ``group``
    in words."""

    suspects: tuple[Suspect, ...]
    group: str = ""

    @property
    def tenants(self) -> tuple[int, ...]:
        return tuple(suspect.tenant for suspect in self.suspects)

    @property
    def caused_ns(self) -> float:
        return sum(suspect.caused_ns for suspect in self.suspects)


def parties_of(case: Case, changes: Mapping[int, Change]) -> list[ChangedParty]:
    """The tenants that changed (by code), as parties: first what the victims are charged most for."""
    charged = {suspect.tenant: suspect for suspect in (*case.own, *case.suspects)}
    changed = [
        replace(charged.get(tenant) or find_suspect(case.excess, tenant, case.loads, case.window), change=change)
        for tenant, change in changes.items()
    ]
    groups = _alike(case, [one for one in changed if one.change is not None and one.change.newcomer])
    grouped = set(tenants_of(groups))
    single = [ChangedParty((suspect,)) for suspect in changed if suspect.tenant not in grouped]
    return sorted([*groups, *single], key=lambda one: -one.caused_ns)


def tenants_of(parties: Sequence[ChangedParty]) -> list[int]:
    return [tenant for party in parties for tenant in party.tenants]


def _alike(case: Case, newcomers: Sequence[Suspect]) -> list[ChangedParty]:
    """Newcomers whose requests are of one shape, as groups."""
    replica = case.replica
    sizes = replica.requests[["prompt_tokens"]].assign(limit=replica.clients["max_tokens"])
    shapes = {}
    for suspect in newcomers:
        mine = sizes[replica.tenant_of_request == suspect.tenant]
        shapes[suspect.tenant] = mine.median().to_numpy(np.float64) + 1.0
    left = sorted(newcomers, key=lambda suspect: -suspect.caused_ns)
    groups = []
    while left:
        shape = shapes[left[0].tenant]
        group = [one for one in left if np.abs(np.log(shapes[one.tenant] / shape)).max() <= np.log(ALIKE)]
        left = [one for one in left if one not in group]
        if len(group) >= FEWEST_ALIKE:
            text = f"{len(group)} newcomers of one shape: prompts of about {shape[0] - 1:,.0f} tokens"
            groups.append(ChangedParty(tuple(group), text))
    return groups
