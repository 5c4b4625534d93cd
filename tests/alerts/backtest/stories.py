"""Small stories for backtests: who is blamed from when to when, what that makes of the metrics, and rules on them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from stallscope.alerts.backtest.rulefile import RuleFile, read_rules
from stallscope.alerts.backtest.timeline import Timeline
from stallscope.diagnosis.model import Confidence, Culprit, Incident, Verdict, Victim
from stallscope.watch.samples import Series, samples_of

START_S = 1_790_000_000
SCRAPE_S = 10
BLAME = "stallscope_blame_seconds_total"

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")

PAGE = """
groups:
- name: blame
  interval: 10s
  rules:
  - alert: Stalls
    expr: sum by (culprit) (rate(stallscope_blame_seconds_total[1m])) > 0.2
    labels: {severity: page, tenant: '{{ $labels.culprit }}'}
    annotations: {catches: noisy_neighbor}
"""


@dataclass(frozen=True)
class Stall:
    """From ``start_s`` to ``end_s`` after the start, ``culprit`` is blamed for a second of waiting in each second."""

    start_s: float
    end_s: float
    culprit: str = "reasoner"
    victim: str = "chat"
    verdict: Verdict = Verdict.NOISY_NEIGHBOR
    per_s: float = 1.0


def ns(elapsed_s: float) -> int:
    """A time of the story."""
    return round((START_S + elapsed_s) * 1e9)


def timeline(
    length_s: float, stalls: Sequence[Stall] = (), *, name: str = "story", also: Sequence[Stall] = ()
) -> Timeline:
    """A scrape every 10 s; ``also``: blame that the diagnosis makes no incident of."""
    scrapes = []
    for elapsed_s in range(0, int(length_s) + 1, SCRAPE_S):
        exposed: dict[Series, float] = {(BLAME, blamed("reasoner")): 0.0}
        for stall in [*stalls, *also]:
            series = (BLAME, blamed(stall.culprit, stall.victim))
            past_s = min(max(elapsed_s - stall.start_s, 0.0), stall.end_s - stall.start_s)
            exposed[series] = exposed.get(series, 0.0) + past_s * stall.per_s
        scrapes.append((ns(elapsed_s), exposed))
    return Timeline(name, samples_of(scrapes), tuple(incident(stall) for stall in stalls))


def blamed(culprit: str, victim: str = "chat") -> tuple[tuple[str, str], ...]:
    """Labels of a pair's blame."""
    return (("culprit", culprit), ("mechanism", "step_boundary"), ("victim", victim))


def incident(stall: Stall) -> Incident:
    """As a diagnosis has it."""
    who = Culprit(stall.culprit, "header", "step_boundary", 1.0, 1.0, 1.0, 0.1, "step time", (), None)
    return Incident(
        replica="replica-0",
        start_ns=ns(stall.start_s),
        end_ns=ns(stall.end_s),
        verdict=stall.verdict,
        confidence=Confidence.HIGH,
        mechanism="step_boundary",
        culprits=(who,) if stall.verdict is Verdict.NOISY_NEIGHBOR else (),
        victims=(Victim(stall.victim, 1, 1, 1.0, (), (), "chat-1"),),
        lost_s=1.0,
        charged_s=1.0,
        charges=(),
        runner_up=None,
        runner_up_share=0.0,
        reasons=(),
    )


def rules(folder: Path, text: str = PAGE) -> RuleFile:
    """A file of rules."""
    path = folder / "rules.yaml"
    path.write_text(text, encoding="utf-8")
    return read_rules(path)
