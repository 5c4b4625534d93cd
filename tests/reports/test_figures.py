"""Figures: which lines are drawn where, how culprits and objectives stand out, and Plotly takes all of it."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs_version

from stallscope.diagnosis.slo import Slo
from stallscope.reports.figures import percentiles_figure, swimlanes_figure
from stallscope.reports.html import page_file
from stallscope.views.colours import colours
from stallscope.views.percentiles import SHOWN_METRICS, Percentiles, percentiles
from stallscope.views.swimlanes import swimlanes
from tests.reports.examples import HOSTILE
from tests.views.recordings import diagnosed, replica

SCENARIO = "reasoning_prompt"
AXES = {"ttft": "y", "itl": "y2", "e2e": "y3"}
CULPRIT = "reasoner"


def view(width: int = 40) -> Percentiles:
    r = replica(SCENARIO)
    return percentiles(r, int(r.timeline.before[0]), int(r.timeline.end[-1]), width)


def drawn(width: int = 40, **options: Any) -> dict[str, Any]:
    diagnosis, looks = diagnosed(SCENARIO), colours(replica(SCENARIO).tenants)
    span = (diagnosis.start_ns, diagnosis.end_ns)
    return percentiles_figure(view(width), span, diagnosis.incidents, looks, **{"metrics": SHOWN_METRICS} | options)


def lines(figure: dict[str, Any], axis: str) -> list[dict[str, Any]]:
    return [trace for trace in figure["data"] if trace["yaxis"] == axis]


def limits(figure: dict[str, Any]) -> list[dict[str, Any]]:
    return [shape for shape in figure["layout"]["shapes"] if shape["type"] == "line"]


@pytest.mark.parametrize("metrics", [("ttft",), ("itl", "ttft"), SHOWN_METRICS])
def test_each_metric_asked_for_has_a_row_with_a_line_of_each_tenant(metrics: tuple[str, ...]) -> None:
    figure = drawn(metrics=metrics)
    assert {trace["yaxis"] for trace in figure["data"]} == set(list(AXES.values())[: len(metrics)])
    for row, metric in enumerate(metrics):
        expected = {line.tenant: line for line in view().nearest(metric, 0.99)}
        for trace in lines(figure, list(AXES.values())[row]):
            assert trace["y"].tolist() == pytest.approx(expected.pop(trace["legendgroup"]).value_s.tolist())
        assert expected == {}
    titles = {"ttft": "TTFT", "itl": "longest gap", "e2e": "end to end"}
    axes = [figure["layout"][name]["title"]["text"] for name in figure["layout"] if name.startswith("yaxis")]
    assert axes == [titles[metric] for metric in metrics]


def test_the_lines_are_of_the_quantile_asked_for_and_say_which_it_is() -> None:
    names = [
        {trace["name"] for trace in lines(drawn(2, quantile=quantile), "y") if trace["legendgroup"] == "chat"}
        for quantile in (0.5, 0.95)
    ]
    assert names == [{"chat p50"}, {"chat p95"}]


def test_the_legend_names_each_tenant_once() -> None:
    named = [trace["legendgroup"] for trace in drawn(medians=True)["data"] if trace["showlegend"]]
    assert sorted(named) == sorted(replica(SCENARIO).tenants)


def test_a_culprit_has_the_thickest_line_and_is_called_one_and_is_not_red() -> None:
    looks = colours([CULPRIT])
    width = {trace["legendgroup"]: trace["line"]["width"] for trace in drawn()["data"]}
    assert width.pop(CULPRIT) >= 2 * max(width.values())
    assert {trace["legendgroup"] for trace in drawn()["data"] if "(culprit)" in trace["name"]} == {CULPRIT}
    culprit = next(trace for trace in drawn()["data"] if trace["legendgroup"] == CULPRIT)
    look = looks[CULPRIT]
    assert (culprit["line"]["color"], culprit["line"]["dash"]) == (look.colour, look.dash)
    assert culprit["marker"]["symbol"] == look.marker


def test_medians_are_thin_lines_beside_the_tails_where_asked_for() -> None:
    without, with_them = drawn(), drawn(medians=True)
    assert len(with_them["data"]) == 2 * len(without["data"])
    tails = max(trace["line"]["width"] for trace in with_them["data"] if trace["mode"] == "lines")
    assert tails < min(trace["line"]["width"] for trace in without["data"])


def test_an_objective_is_a_dashed_line_on_the_row_of_its_metric() -> None:
    slos = [Slo(None, "ttft", 500_000_000, 0.99), Slo("chat", "itl", 80_000_000, 0.999), Slo(None, "delivery", 1, 0.5)]
    ttft, itl = limits(drawn(slos=slos))
    assert (ttft["yref"], ttft["y0"], ttft["y1"], ttft["line"]["dash"]) == ("y", 0.5, 0.5, "dash")
    assert ttft["label"]["text"] == "SLO p99 500 ms"
    assert (itl["yref"], itl["y0"], itl["label"]["text"]) == ("y2", 0.08, "SLO chat p99.9 80 ms")
    assert itl["line"]["color"] == colours(["chat"])["chat"].colour
    assert limits(drawn(slos=slos, metrics=("e2e",))) == []


@pytest.mark.parametrize("name", HOSTILE)
def test_an_objectives_tenant_is_text_with_nothing_to_render(name: str) -> None:
    (limit,) = limits(drawn(slos=[Slo(name, "ttft", 500_000_000, 0.99)]))
    assert not set(limit["label"]["text"]) & set("<>$\n")


def test_a_tenant_has_the_same_colour_among_the_swimlanes_and_a_culprit_is_edged() -> None:
    r, (worst, *_) = replica(SCENARIO), diagnosed(SCENARIO).incidents
    batch = swimlanes(r, worst.start_ns, worst.end_ns)
    assert batch is not None
    figure: dict[str, Any] = swimlanes_figure(batch, [worst], colours(r.tenants))
    bars = {trace["name"]: trace["marker"] for trace in figure["data"] if trace["showlegend"]}
    edged = {name for name, marker in bars.items() if marker["line"]["width"]}
    assert edged == {f"{CULPRIT} (culprit)"} < set(bars)
    for name, marker in bars.items():
        look = colours(r.tenants)[name.removesuffix(" (culprit)")]
        assert marker["line"]["color"] == look.colour


def test_what_draws_is_of_the_version_whose_schema_is_tested_here() -> None:
    """`make plotly` fetches it anew."""
    assert f"plotly.js (basic - minified) v{get_plotlyjs_version()}\n" in page_file("plotly.js")[:200]


def test_plotly_takes_every_part_of_the_figure() -> None:
    made = go.Figure(drawn(medians=True, slos=[Slo(None, "ttft", 500_000_000, 0.99)]))
    assert len(made.data) == 2 * 3 * len(replica(SCENARIO).tenants)
    looks = set(colours(map(str, range(100))).values()) | set(colours(["(others)", "(unknown)", "(engine)"]).values())
    for look in looks:
        go.Scatter(line={"color": look.colour, "dash": look.dash}, marker={"symbol": look.marker})
