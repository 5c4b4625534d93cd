"""Names of tenants come from outside: whatever is in them, rules stay valid and mean the same."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path

import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from stallscope.alerts.choices import Format, Pack
from stallscope.alerts.commands import command
from stallscope.alerts.export import export
from stallscope.alerts.promtool import check_rules
from stallscope.alerts.quantities import Counted, Quantity
from stallscope.alerts.rules import Owner
from stallscope.alerts.settings import Limit
from stallscope.alerts.texts import ByLabel, Found, Label, Text, for_prometheus
from stallscope.alerts.thresholds import Level, Threshold
from stallscope.alerts.yaml_text import TextDumper
from stallscope.diagnosis.slo import Slo
from stallscope.watch.families import BLAME
from tests.alerts.unit_tests import OWNER, UnitTest, annotated, needs_promtool

names = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("\"'\\{}$`%\n\r\t \x85\u2028\ufeff\0😀"), min_size=1
)
tenants = st.lists(names.filter(lambda name: name not in ("(other)", "(unknown)")), min_size=1, max_size=6, unique=True)
HOSTILE = [
    'a"b',
    'a\\"b',
    "a\nb",
    "a\\nb",
    "{{ x }}",
    "{{x}}",
    '{{ query "up" }}',
    "{{",
    "}}",
    "'; rm -rf /; '",
    "$labels",
    "${HOME}",
    "%q%[1]q",
    "a.*|b",
    "a.b",
    " a",
    "a ",
    "é",
    "e\u0301",
    "😀",
    "--help",
    "x" * 300,
    "null",
    "# no comment",
    "- [a, {b: *c}]",
    "\x00\x1f\x7f\x85\u2028",
]
few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Taught:
    """A teacher that has a threshold of its own for each tenant: n + 0.5 for the nth."""

    def __init__(self, tenants: list[str]) -> None:
        self._own = {name: Level(number + 0.5, f"of {name}") for number, name in enumerate(tenants)}

    def threshold(self, quantity: Quantity, limit: Limit) -> Threshold:
        own = self._own if quantity.by[:1] == ("culprit",) and quantity.window_s == 60 else {}
        return Threshold(Level(limit.floor, limit.reason), own)


def objectives_of(tenants: list[str]) -> list[Slo]:
    """One for all that everybody misses, and a wide one for each of these."""
    return [Slo(None, "ttft", 500_000_000, 0.99), *(Slo(name, "ttft", 4_000_000_000, 0.99) for name in tenants)]


@needs_promtool
@example(tenants=HOSTILE)
@given(tenants)
@few
def test_each_tenant_is_matched_by_its_own_name_alone(tenants: list[str]) -> None:
    """Every second tenant lies above its own threshold; the others lie far above the common one, and yet are calm."""
    rules = export(Taught(tenants), objectives_of(tenants), OWNER, Pack.BLAME, Format.PROMETHEUS).text
    test = UnitTest()
    above = tenants[::2]
    for number, name in enumerate(tenants):
        rate = number + (1.0 if name in above else 0.25)
        rises = [rate * 10 * step for step in range(20)]
        test.scraped(BLAME.name, {"victim": "victim", "culprit": name, "mechanism": "kv_pinning"}, rises)
    for name in (*tenants, "without an objective of its own"):
        for bound, share in (("0.5", 0), ("4.0", 1), ("+Inf", 1)):
            counts = [share * 10.0 * step for step in range(20)]
            test.scraped("stallscope_ttft_seconds_bucket", {"tenant": name, "le": bound}, counts)
        test.scraped("stallscope_ttft_seconds_count", {"tenant": name}, [10.0 * step for step in range(20)])
    page = {"severity": "page", "team": "inference"}
    test.firing(180, "StallscopeTenantStallsOthers", [{"culprit": name, "tenant": name, **page} for name in above])
    alone = {"tenant": "without an objective of its own", "slo": "ttft=500ms@p99"}
    test.firing(180, "StallscopeSloFastBurn", [{**alone, **page}])
    with tempfile.TemporaryDirectory() as folder:
        test.passes(rules, Path(folder))


@needs_promtool
@example(tenants=HOSTILE)
@example(tenants=["\x85", "a\u2028b"])
@given(tenants)
@few
def test_what_an_alert_says_has_the_names_as_they_are(tenants: list[str]) -> None:
    """Labels, looked-up victims, texts by tenant, literal texts, and the word of a shell's command."""
    owner = Owner(tenants[0], tenants[0], tenants[0])
    text: dict[str, Text] = {
        "label": (Label("culprit"), " and ", tenants[0]),
        "found": (Found("sum by (victim) (blame{culprit=%[1]q})", "culprit", "victim", "nobody", valued=True),),
        "none": (Found("none{culprit=%[1]q}", "culprit", "victim", tenants[0]),),
        "by": (ByLabel("culprit", {name: f"of {name}" for name in tenants[::2]}, f"not {tenants[0]}"),),
        "command": command(owner, "culprit", "none{culprit=%[1]q}"),
    }
    rendered = {name: for_prometheus(parts) for name, parts in text.items()}
    rule = {"alert": "A", "expr": "sum by (culprit) (blame) > 0", "annotations": rendered}
    rule["labels"] = {"team": for_prometheus((tenants[0],))}
    test = UnitTest()
    expected = []
    for name in tenants:
        test.scraped("blame", {"culprit": name, "victim": f"of {name}"}, [2.0] * 5)
        quoted = name.replace("'", "'\\''")
        said = {
            "label": f"{name} and {tenants[0]}",
            "found": f"of {name} 2",
            "none": tenants[0],
            "by": f"of {name}" if name in tenants[::2] else f"not {tenants[0]}",
            "command": f"stallscope analyze {shlex.quote(tenants[0])} --since -20m --tenant='{quoted}'",
        }
        expected.append(({"culprit": name, "team": tenants[0]}, said))
        words = ["stallscope", "analyze", tenants[0], "--since", "-20m", f"--tenant={name}"]
        assert shlex.split(said["command"]) == words
    test.saying(20, "A", expected)
    with tempfile.TemporaryDirectory() as folder:
        test.passes(
            yaml.dump({"groups": [{"name": "g", "rules": [rule]}]}, Dumper=TextDumper, allow_unicode=True), Path(folder)
        )


@needs_promtool
@example(tenants=HOSTILE)
@given(tenants)
@few
def test_every_format_is_yaml_with_the_same_expressions_that_promtool_takes(tenants: list[str]) -> None:
    owner = Owner(tenants[0], tenants[0], tenants[0])
    made = {form: export(Taught(tenants), objectives_of(tenants), owner, Pack.BOTH, form) for form in Format}
    plain = yaml.safe_load(made[Format.PROMETHEUS].text)
    assert yaml.safe_load(made[Format.PROMETHEUSRULE].text)["spec"] == plain
    check_rules(made[Format.PROMETHEUS].text, "promtool")
    check_rules(made[Format.GRAFANA].checkable, "promtool")
    grafana = yaml.safe_load(made[Format.GRAFANA].text)
    shown = [rule for group in grafana["groups"] for rule in group["rules"]]
    checked = [rule for group in yaml.safe_load(made[Format.GRAFANA].checkable)["groups"] for rule in group["rules"]]
    assert [rule["data"][0]["model"]["expr"] for rule in shown] == [rule["expr"] for rule in checked]
    assert not [rule for rule in shown for text in (rule["labels"] | rule["annotations"]).values() if "$" in text]


@needs_promtool
@example(culprit=HOSTILE[0], victims=HOSTILE[1:4])
@given(names.filter(lambda name: name not in ("(other)", "(unknown)")), tenants.filter(lambda found: len(found) <= 3))
@few
def test_a_page_names_culprit_and_victims_as_they_are(culprit: str, victims: list[str]) -> None:
    rules = export(Taught([]), [], OWNER, Pack.BLAME, Format.PROMETHEUS).text
    others = [name for name in victims if name != culprit] or ["somebody else"]
    test = UnitTest()
    for number, name in enumerate(others):
        rises = [(10.0 - number) * step for step in range(20)]
        test.scraped(BLAME.name, {"victim": name, "culprit": culprit, "mechanism": "prefill_queue"}, rises)
    total = sum(1 - number / 10 for number in range(len(others)))
    said = (
        f"{culprit} is stalling {', '.join(others)} right now: its prompts took the tokens of each step, and theirs had"
        f" to queue ({total:.3g} requests held up at any time)."
    )
    labels = {"culprit": culprit, "tenant": culprit, "severity": "page", "team": "inference"}
    test.saying(180, "StallscopeTenantStallsOthers", [(labels, {"summary": said})])
    with tempfile.TemporaryDirectory() as folder:
        test.passes(annotated(rules, "summary"), Path(folder))


def test_what_is_counted_has_the_matcher_of_its_mechanism_and_that_of_the_name() -> None:
    quantity = Counted(BLAME, ("culprit",), 60, where=("mechanism", ("kv_pinning",)))
    assert quantity.promql('culprit="a"') == (
        'sum by (culprit) (rate(stallscope_blame_seconds_total{mechanism="kv_pinning",culprit="a"}[1m]))'
    )
