"""The text is what its formats demand, whatever tenants are called: Prometheus' own tools say so."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from prometheus_client.parser import text_string_to_metric_families

from stallscope.watch.families import FAMILIES, RECEIVED, SERIES, Kind
from tests.watch.scoring import HOSTILE, START_NS, S, Scored, buckets, scored

PROMTOOL = shutil.which("promtool")


def full() -> Scored:
    """Every family, with every hostile name."""
    it = scored()
    for family in FAMILIES:
        if family is SERIES:
            continue  # it is the score's own
        for name in HOSTILE if family.labels else ("",):
            labels = (name,) * len(family.labels)
            if family.kind is Kind.GAUGE:
                it.scores.set(family, labels, 0.5)
            elif family.kind is Kind.COUNTER:
                it.scores.add(family, labels, 0.1)
            else:
                it.scores.observe(family, labels, buckets(0, 1), 0.07)
    return it


@pytest.mark.skipif(PROMTOOL is None, reason="Debian's prometheus, which brings promtool, is not installed")
def test_promtool_finds_nothing_to_remark() -> None:
    assert PROMTOOL is not None
    text = full().scores.exposition_classic()
    checked = subprocess.run([PROMTOOL, "check", "metrics"], input=text, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_both_formats_say_the_same() -> None:
    one, other = full(), full()
    classic = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(one.scores.exposition_classic().decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }
    assert classic == other.scores.exposed()


def test_every_family_is_there_with_its_kind_unit_and_meaning() -> None:
    lines = full().scores.exposition().decode().split("\n")
    for family in FAMILIES:
        name = family.name.removesuffix("_total") if family.kind is Kind.COUNTER else family.name
        assert f"# TYPE {name} {family.kind}" in lines
        assert f"# HELP {name} {family.help}" in lines
        assert (f"# UNIT {name} {family.unit}" in lines) == bool(family.unit)
    assert lines[-2:] == ["# EOF", ""]


def test_counters_without_labels_say_since_when_they_count() -> None:
    name = RECEIVED.name.removesuffix("_total")
    (created,) = [
        line for line in full().scores.exposition().decode().splitlines() if line.startswith(f"{name}_created")
    ]
    assert float(created.split()[1]) * S == START_NS
