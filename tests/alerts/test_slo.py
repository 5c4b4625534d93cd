"""Burn rates of SLOs by tenant, evaluated by Prometheus, and SLOs that make no sense."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from stallscope.alerts import settings as s
from stallscope.alerts.choices import Format, Pack
from stallscope.alerts.export import export
from stallscope.alerts.promql import equal
from stallscope.alerts.slo import limit_of, notes, objectives
from stallscope.alerts.thresholds import NoTeacher
from stallscope.diagnosis.slo import parse_slo
from stallscope.errors import UsageError
from stallscope.watch import families as f
from stallscope.watch.names import label_value
from tests.alerts.unit_tests import OWNER, STEP_S, UnitTest, annotated, needs_promtool

PAGE = {"severity": "page", "team": "inference"}
TICKET = {"severity": "ticket", "team": "inference"}
HOURS = 3600 // STEP_S


def rules(*slos: str, pack: Pack = Pack.BLAME) -> str:
    return export(NoTeacher(), [parse_slo(text) for text in slos], OWNER, pack, Format.PROMETHEUS).text


def alerts(text: str, name: str) -> list[dict[str, object]]:
    found = [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]
    return [rule for rule in found if rule.get("alert") == name and rule["labels"].get("cause") != "slo_bucket"]


def served(test: UnitTest, tenant: str, slow: list[float], per_second: float = 1.0, bound: str = "0.5") -> None:
    """Requests by the share of them that is slower than the bound, a scrape each."""
    within, every, total, fast = [], [], 0.0, 0.0
    for share in slow:
        total += per_second * STEP_S
        fast += per_second * STEP_S * (1 - share)
        every.append(total)
        within.append(fast)
    test.scraped(f"{f.TTFT.name}_bucket", {"tenant": tenant, "le": bound}, within)
    test.scraped(f"{f.TTFT.name}_bucket", {"tenant": tenant, "le": "+Inf"}, every)
    test.scraped(f"{f.TTFT.name}_count", {"tenant": tenant}, every)


@needs_promtool
def test_a_fast_burn_pages_for_its_tenant_and_is_silent_soon_after_it_ends(tmp_path: Path) -> None:
    test = UnitTest()
    served(test, "chat", [0.0] * HOURS + [0.5] * HOURS + [0.0] * HOURS)
    served(test, "search", [0.02] * (3 * HOURS))
    burning = {"tenant": "chat", "slo": "ttft=500ms@p99", **PAGE}
    test.firing(3600, "StallscopeSloFastBurn", [])
    test.firing(2 * 3600, "StallscopeSloFastBurn", [burning])
    # The burn over 1 h has a short window of 5 min; the one over 6 h, of 30 min, in which 2 min of slow requests count.
    test.firing(2 * 3600 + 3000, "StallscopeSloFastBurn", [])
    test.passes(rules("ttft=500ms@p99"), tmp_path)


@needs_promtool
def test_a_few_slow_requests_of_few_are_chance_and_page_nobody(tmp_path: Path) -> None:
    """14.4 x 1% of an hour's requests need 35 of them for five to be slow: 20 come, all slow."""
    test = UnitTest()
    served(test, "chat", [1.0] * HOURS, per_second=20 / 3600)
    test.firing(3600 - STEP_S, "StallscopeSloFastBurn", [])
    served(test, "busy", [1.0] * HOURS, per_second=200 / 3600)
    busy = {"tenant": "busy", "slo": "ttft=500ms@p99"}
    test.exprs.clear()
    test.firing(3600 - STEP_S, "StallscopeSloFastBurn", [busy | PAGE])
    test.passes(rules("ttft=500ms@p99"), tmp_path)


@needs_promtool
def test_a_slow_burn_is_a_ticket(tmp_path: Path) -> None:
    test = UnitTest()
    served(test, "chat", [0.04] * (3 * HOURS))
    test.firing(3 * 3600 - STEP_S, "StallscopeSloFastBurn", [])
    test.firing(3 * 3600 - STEP_S, "StallscopeSloSlowBurn", [{"tenant": "chat", "slo": "ttft=500ms@p99", **TICKET}])
    test.passes(rules("ttft=500ms@p99"), tmp_path)


@needs_promtool
@pytest.mark.parametrize("bound", ["2.0", "2"])
def test_whole_seconds_are_found_as_either_text_format_writes_them(tmp_path: Path, bound: str) -> None:
    test = UnitTest()
    served(test, "chat", [0.5] * HOURS, bound=bound)
    test.firing(3600 - STEP_S, "StallscopeSloFastBurn", [{"tenant": "chat", "slo": "ttft=2s@p99", **PAGE}])
    test.passes(rules("ttft=2s@p99"), tmp_path)


@needs_promtool
def test_an_objective_that_the_collector_was_not_told_of_is_a_ticket_and_not_silence(tmp_path: Path) -> None:
    test = UnitTest()
    served(test, "chat", [0.5] * HOURS, bound="0.5")
    served(test, "told", [0.0] * HOURS, bound="0.3")
    lost = {"tenant": "chat", "slo": "ttft=300ms@p99", "cause": "slo_bucket"}
    test.firing(600, "StallscopeTelemetryLost", [lost | TICKET])
    test.passes(rules("ttft=300ms@p99"), tmp_path)


@needs_promtool
def test_the_page_says_how_many_were_slow_and_who_stalled_them(tmp_path: Path) -> None:
    test = UnitTest()
    served(test, "chat", [0.25] * (2 * HOURS))
    rises = [float(number) for number in range(2 * HOURS)]
    test.scraped(f.BLAME.name, {"victim": "chat", "culprit": "hog", "mechanism": "kv_pinning"}, rises)
    said = "chat misses its objective: 25% of its requests were slower than 500ms (1% may be); stalled by: hog."
    labels = {"tenant": "chat", "slo": "ttft=500ms@p99", **PAGE}
    test.saying(7000, "StallscopeSloFastBurn", [(labels, {"summary": said})])
    test.passes(annotated(rules("ttft=500ms@p99"), "summary"), tmp_path)


def test_burns_that_can_t_be_are_left_out_and_said() -> None:
    """Of p90, 14.4 times the budget would be 144% of the requests; of p50, no page can be at all."""
    (fast,) = alerts(rules("ttft=2s@p90"), "StallscopeSloFastBurn")
    assert "ratio_rate6h" in str(fast["expr"])
    assert "ratio_rate1h" not in str(fast["expr"])
    assert not alerts(rules("ttft=2s@p50"), "StallscopeSloFastBurn")
    assert alerts(rules("ttft=2s@p50"), "StallscopeSloSlowBurn")
    (said,) = notes(objectives([parse_slo("ttft=2s@p50")]))
    assert said.endswith("there is only a ticket")


def test_a_fine_percentile_says_how_many_requests_it_needs() -> None:
    (said,) = notes(objectives([parse_slo("ttft=1s@p99.999")]))
    assert "34,723 requests of a tenant in an hour" in said
    (rule,) = alerts(rules("ttft=1s@p99.999"), "StallscopeSloFastBurn")
    assert ">= 34723" in str(rule["expr"])


@pytest.mark.parametrize(
    ("slos", "said"),
    [
        (["ttft=900us@p99"], "nothing is answered within 900us"),
        (["itl=61m@p99"], "nobody waits longer than 3660s"),
        (["ttft=1s@p99.99999"], "can't be told from luck"),
        (["delivery=1s@p99"], "no metric of the collector tells delivery"),
        ([":ttft=1s@p99"], "the tenant has no name"),
        (["chat:ttft=1s@p99", "chat:ttft=2s@p99"], "contradict each other"),
        (["ttft=2s@p50", "ttft=1s@p99"], "the higher percentile with the shorter limit says all"),
    ],
)
def test_slos_that_make_no_sense_are_refused_with_a_reason_on_one_line(slos: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        objectives([parse_slo(text) for text in slos])
    assert "\n" not in str(refused.value)


def test_a_name_that_no_label_can_have_is_matched_as_the_metrics_show_it() -> None:
    for name in ("\udcff", "x" * 2000):
        (objective,) = objectives([parse_slo(f"{name}:ttft=1s@p99")])
        assert objective.matchers() == (equal("tenant", label_value(name)),)
        assert label_value(name) != name


def test_slos_that_go_together_are_taken() -> None:
    given_twice = ["ttft=1s@p99", "ttft=1s@p99", "ttft=300ms@p50", "itl=1s@p99", "chat:ttft=2s@p99", "b:ttft=2s@p99"]
    found = objectives([parse_slo(text) for text in given_twice])
    assert [one.full_name for one in found] == [*given_twice[1:4], *given_twice[4:]]
    assert found[0].others == ("b", "chat")


def test_the_limits_of_a_workbook_are_said_with_the_budget_s_end() -> None:
    (fast,) = alerts(rules("ttft=500ms@p99"), "StallscopeSloFastBurn")
    reason = fast["annotations"]["threshold_reason"]  # type: ignore[index]
    assert reason.startswith("14.4 x 1% over 1h and 5m, of at least 35 requests; 6 x 1% over 6h and 30m")
    assert (s.FAST_BURNS[0].factor, s.SLOW_BURNS[1].long_s) == (14.4, 3 * 86_400)


@given(st.integers(1, 3_600_000_000))
def test_a_limit_is_written_as_it_is_read(limit_us: int) -> None:
    slo = parse_slo(f"ttft={limit_us}us@p99")
    assert parse_slo(f"ttft={limit_of(slo)}@p99") == slo


def test_the_plain_pack_takes_an_objective_for_all_as_its_threshold_and_says_that_it_has_no_tenants() -> None:
    text = rules("ttft=3s@p95", "chat:itl=1s@p99", pack=Pack.PLAIN)
    for rule in alerts(text, "StallscopePlainTtftHigh"):
        assert str(rule["expr"]).startswith("histogram_quantile(0.95,")
        assert str(rule["expr"]).endswith("> 3")
    made = export(NoTeacher(), [parse_slo("chat:itl=1s@p99")], OWNER, Pack.PLAIN, Format.PROMETHEUS)
    assert made.notes == ("the plain pack has no tenants, and so no objective of 'chat'",)
