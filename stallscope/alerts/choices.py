"""What a user chooses between; apart from what makes rules, so that --help loads nothing heavy."""

from __future__ import annotations

from enum import StrEnum

TEAM, RUNBOOKS, FOLDER = "inference", "docs/runbooks", "spans"  # of who says nothing else


class Format(StrEnum):
    """Who loads the rules."""

    PROMETHEUS = "prometheus"
    PROMETHEUSRULE = "prometheusrule"
    GRAFANA = "grafana"


class Pack(StrEnum):
    """What the rules look at: a watch's metrics, those of the engines themselves, or both."""

    BLAME = "blame"
    PLAIN = "plain"
    BOTH = "both"
