"""What all formats share: the labels and annotations of a rule, and YAML that reads well."""

from __future__ import annotations

from collections.abc import Callable

import yaml

from stallscope.alerts.rules import Owner, Rule
from stallscope.alerts.texts import Text
from stallscope.alerts.yaml_text import TextDumper

Render = Callable[[Text], str]
_WIDTH = 1_000_000  # PromQL and templates are not folded


def labels_of(rule: Rule, owner: Owner, render: Render) -> dict[str, str]:
    """``severity`` and ``team`` for routing, and what the alert is about."""
    about = {name: render(text) for name, text in rule.about.items()}
    return {"severity": rule.severity.value, "team": render((owner.team,)), **about}


def annotations_of(rule: Rule, owner: Owner, render: Render) -> dict[str, str]:
    """What a person reads, the answer first."""
    return {
        "summary": render(rule.summary),
        "description": render(rule.description),
        "evidence": render(rule.evidence),
        "threshold_reason": render(rule.threshold_reason),
        "command": render(rule.command),
        "runbook_url": render((owner.runbook(rule),)),
        "catches": " ".join(rule.catches),
        "names": rule.names,
    }


def write_yaml(document: object, heading: str) -> str:
    """A document under comments."""
    comments = "".join(f"# {line}\n" for line in heading.splitlines())
    return comments + yaml.dump(document, Dumper=TextDumper, sort_keys=False, allow_unicode=True, width=_WIDTH)
