"""SLOs as users write them, and what they make an incident of."""

from __future__ import annotations

import pytest

from stallscope.diagnosis import Diagnosis, Verdict, diagnose
from stallscope.diagnosis.slo import Slo, parse_slo
from stallscope.errors import UsageError
from tests.diagnosis.replay.recorded import CHAT, FLOOD, PLAIN, recorded

WHOLE_PROMPTS = f"{PLAIN}, max_num_batched_tokens: 8192, chunked_prefill: false"


@pytest.mark.parametrize(
    ("text", "slo"),
    [
        ("ttft=500ms@p99", Slo(None, "ttft", 500_000_000, 0.99)),
        ("itl=0.1s@p99.9", Slo(None, "itl", 100_000_000, 0.999)),
        ("chat:itl=100ms@p90", Slo("chat", "itl", 100_000_000, 0.9)),
        ("team:a=b:ttft=2m@p50", Slo("team:a=b", "ttft", 120_000_000_000, 0.5)),
        (":ttft=800us@p50", Slo("", "ttft", 800_000, 0.5)),
    ],
)
def test_metric_limit_percentile_and_tenant_are_read(text: str, slo: Slo) -> None:
    read = parse_slo(text)
    assert (read.tenant, read.metric, read.limit_ns) == (slo.tenant, slo.metric, slo.limit_ns)
    assert read.quantile == pytest.approx(slo.quantile)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "'' is no metric"),
        ("tpot=5ms@p99", "'tpot' is no metric (ttft, itl, delivery)"),
        ("ttft", "'' is no metric"),
        ("ttft=500@p99", "'500@p99' is no limit at a percentile"),
        ("ttft=500ms", "'500ms' is no limit at a percentile"),
        ("ttft=500ms@99", "no limit at a percentile"),
        ("ttft=-1s@p99", "no limit at a percentile"),
        ("ttft=0ms@p99", "must be above 0"),
        ("ttft=1s@p100", "between p0 and p100"),
        ("ttft=1s@p0", "between p0 and p100"),
    ],
)
def test_a_mistake_is_one_line_with_an_example(text: str, says: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_slo(text)
    assert says in str(error.value)
    assert "such as ttft=500ms@p99" in str(error.value)
    assert "\n" not in str(error.value)


# --- what they make an incident of --------------------------------------------------------------------------------


def under(*slos: str, text: str = CHAT, engine: str = PLAIN) -> Diagnosis:
    return diagnose(recorded(text, engine), slos=[parse_slo(slo) for slo in slos], replay=False)


def victims(diagnosis: Diagnosis) -> set[str]:
    return {victim.tenant for incident in diagnosis.incidents for victim in incident.victims}


def test_a_tighter_limit_than_the_usual_finds_an_incident_where_there_was_none() -> None:
    assert under().verdict is Verdict.HEALTHY
    assert victims(under("ttft=20ms@p99")) == {"chat", "search"}
    assert under("ttft=2s@p99").verdict is Verdict.HEALTHY


def test_a_limit_that_nothing_exceeds_takes_the_place_of_the_learned_usual() -> None:
    assert under(text=CHAT + FLOOD).incidents
    assert not under("ttft=60s@p99", "itl=60s@p99", text=CHAT + FLOOD).incidents


def test_a_tenants_own_objective_goes_before_the_one_for_all() -> None:
    assert victims(under("ttft=20ms@p99", "chat:ttft=9s@p99")) == {"search"}
    assert victims(under("chat:ttft=9s@p99", "ttft=20ms@p99")) == {"search"}
    assert "chat" in victims(under("ttft=9s@p99", "chat:ttft=20ms@p99"))


def test_the_percentile_says_how_many_may_exceed_the_limit() -> None:
    assert under("chat:ttft=20ms@p99", "search:ttft=9s@p99").incidents
    assert not under("chat:ttft=20ms@p80", "search:ttft=9s@p99").incidents


def test_an_objective_for_one_metric_excuses_no_other() -> None:
    # Nine tenths of the requests may wait for their first token; nobody said that of the gaps.
    stalled = under(text=CHAT + FLOOD, engine=WHOLE_PROMPTS)
    patient = under("ttft=60s@p10", text=CHAT + FLOOD, engine=WHOLE_PROMPTS)
    assert "chat" in victims(stalled)
    assert "chat" in victims(patient)


def test_an_objective_for_nobody_in_the_trace_is_one_line() -> None:
    with pytest.raises(UsageError, match="SLO for 'chta': the trace has no such tenant, but search, chat") as error:
        under("chta:ttft=1s@p99")
    assert "\n" not in str(error.value)
