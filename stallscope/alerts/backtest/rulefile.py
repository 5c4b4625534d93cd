"""Reads a file of alert rules, Prometheus' own or a PrometheusRule of its operator, and writes it as Prometheus has it.

Everything stays text: what a number or a duration is, Prometheus says.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import yaml

from stallscope.alerts.backtest.expressions import seconds
from stallscope.alerts.yaml_text import TextDumper
from stallscope.errors import UsageError
from stallscope.views.words import printable

PAGES = ("page", "critical")
TAG = "backtest_rule"  # the label that tells rules of one name apart while Prometheus evaluates
_NAMES_A_RESOURCE = "kind"


@dataclass(frozen=True)
class Alert:
    """An alert rule; ``number`` counts all of the file from 0, ``interval_s`` is its group's (None: not said there)."""

    number: int
    group: str
    name: str
    expression: str
    for_s: float
    interval_s: float | None
    labels: Mapping[str, str]
    annotations: Mapping[str, str]

    @property
    def severity(self) -> str:
        return self.labels.get("severity", "")

    @property
    def is_page(self) -> bool:
        return self.severity in PAGES

    @property
    def catches(self) -> frozenset[str]:
        """The verdicts that it is for; empty: any."""
        return frozenset(self.annotations.get("catches", "").split())

    def claims(self, verdict: str) -> bool:
        return not self.catches or verdict in self.catches


@dataclass(frozen=True)
class RuleFile:
    """``documents``: its YAML, scalars as text; one has ``groups``, or is a resource that has them."""

    path: Path
    source: str  # the file as it is
    documents: tuple[dict[str, object], ...]
    alerts: tuple[Alert, ...]
    recordings: Mapping[str, list[str]]  # expressions by the name that they are recorded as

    @property
    def is_resource(self) -> bool:
        return any(_NAMES_A_RESOURCE in document for document in self.documents)

    def text(self, *, tagged: bool = False) -> str:
        """As Prometheus reads it; ``tagged``: each alert has the label ``TAG``, its number."""
        groups = [deepcopy(group) for document in self.documents for group in _groups(document)]
        number = 0
        names: set[str] = set()
        for group in groups:
            while group.get("name") in names:  # two resources may each have a group of that name
                group["name"] = f"{group['name']}_"
            names.add(_text(group.get("name")))
            for rule in _rules(group):
                if "alert" in rule and tagged:
                    rule["labels"] = {**_texts(rule.get("labels")), TAG: str(number)}
                number += "alert" in rule
        return _written({"groups": groups})

    def with_expressions(self, changed: Mapping[int, str], reasons: Mapping[int, str], annotation: str) -> RuleFile:
        """The same file where alerts, by their numbers, have other expressions, and an annotation that says why."""
        documents = deepcopy(self.documents)
        number = 0
        for document in documents:
            for rule in (rule for group in _groups(document) for rule in _rules(group)):
                if "alert" not in rule:
                    continue
                if number in changed:
                    rule["expr"] = changed[number]
                    rule["annotations"] = {**_texts(rule.get("annotations")), annotation: reasons[number]}
                number += 1
        return _parsed(self.path, self.source, documents)

    def own_text(self) -> str:
        """As the file was: a resource stays one."""
        return "---\n".join(_written(document) for document in self.documents)


def read_rules(path: Path) -> RuleFile:
    """Raises UsageError where it is no file of rules; whether the rules are sound, promtool says."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); give a file of Prometheus rules") from error
    return parse_rules(text, path)


def parse_rules(text: str, path: Path) -> RuleFile:
    """The same of what a file at ``path`` has, or would have."""
    try:
        documents = [one for one in yaml.load_all(text, Loader=_AllText) if one not in (None, "")]
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: no YAML ({printable(' '.join(str(error).split()))})") from error
    if not documents or not all(isinstance(one, dict) for one in documents):
        raise UsageError(f"{path}: no alert rules; give YAML with groups:, or a PrometheusRule")
    if len(documents) > 1 and any(_NAMES_A_RESOURCE not in document for document in documents):
        raise UsageError(f"{path}: {len(documents)} YAML documents, of which Prometheus reads the first; make them one")
    for document in documents:
        kind = document.get(_NAMES_A_RESOURCE)
        if kind is not None and kind != "PrometheusRule":
            raise UsageError(f"{path}: a {printable(str(kind))}; of resources, only kind: PrometheusRule has rules")
    return _parsed(path, text, tuple(documents))


class _AllText(yaml.SafeLoader):
    """Leaves scalars as they are written, but for null; ``<<`` still merges."""


_AllText.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _parsed(path: Path, source: str, documents: tuple[dict[str, object], ...]) -> RuleFile:
    alerts: list[Alert] = []
    recordings: dict[str, list[str]] = {}
    try:
        for group in (group for document in documents for group in _groups(document)):
            interval = _text(group.get("interval"))
            for rule in _rules(group):
                expression = _text(rule.get("expr"))
                if "record" in rule:
                    recordings.setdefault(_text(rule["record"]), []).append(expression)
                    continue
                alerts.append(
                    Alert(
                        number=len(alerts),
                        group=_text(group.get("name")),
                        name=_text(rule["alert"]),
                        expression=expression,
                        for_s=seconds(_text(rule.get("for"))),
                        interval_s=seconds(interval) if interval else None,
                        labels=_texts(rule.get("labels")),
                        annotations=_texts(rule.get("annotations")),
                    )
                )
    except (KeyError, TypeError, ValueError) as error:
        reason = f"a rule has neither {error} nor record" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"{path}: not as Prometheus has rules: {printable(reason)}") from error
    if not alerts:
        raise UsageError(f"{path}: no alert rules; give YAML with groups:, or a PrometheusRule")
    return RuleFile(path, source, documents, tuple(alerts), recordings)


# --- the YAML's tree ----------------------------------------------------------------------------------------------


def _groups(document: dict[str, object]) -> list[dict[str, object]]:
    if _NAMES_A_RESOURCE in document:
        spec = document.get("spec")
        document = spec if isinstance(spec, dict) else {}
    return _mappings(document.get("groups"), "groups")


def _rules(group: dict[str, object]) -> list[dict[str, object]]:
    return _mappings(group.get("rules"), "rules")


def _mappings(value: object, what: str) -> list[dict[str, object]]:
    if value in (None, ""):
        return []
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise TypeError(f"{what} is no list of mappings")
    return value


def _texts(value: object) -> dict[str, str]:
    if value in (None, ""):
        return {}
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is no mapping of names to texts")
    return {_text(name): _text(text) for name, text in value.items()}


def _text(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _written(document: Mapping[str, object]) -> str:
    made = deepcopy(dict(document))
    for group in _groups(made):
        limit = group.get("limit")
        if isinstance(limit, str) and limit.isdigit():
            group["limit"] = int(limit)
    text = yaml.dump(made, Dumper=TextDumper, sort_keys=False, allow_unicode=True, width=10_000)
    return str(text)
