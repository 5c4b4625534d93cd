"""Tenants: what each took of the engine, how fairly that went, and who made whom wait."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
from dash import html
from dash.development.base_component import Component

from stallscope.reports import pieces
from stallscope.reports.figures import Figure, fairness_figure, shares_figure
from stallscope.reports.markup import Html, element
from stallscope.views import words
from stallscope.views.blame import blame_balance
from stallscope.views.shares import Spent, shares
from stallscope_dash import parts, window
from stallscope_dash.figures import framed
from stallscope_dash.pages import Page, Part
from stallscope_dash.recording import NotReadyError
from stallscope_dash.scene import Scene
from stallscope_dash.tables import Column, grid

_BINS = 90
_COSTS = {
    "step_time": ("Step time", "Shares of what steps cost, by the cost model; what an empty step costs is nobody's."),
    "tokens": ("Tokens", "Shares of the tokens that were computed."),
    "kv": ("KV cache", "Shares of block-seconds: a block that is held for a second."),
}
_FAIRNESS = parts.time_chart("fairness")
_COLUMNS = (
    Column("tenant", "tenant"),
    Column("blamed", "blamed for"),
    Column("source", "named by"),
    Column("requests", "requests", decimals=0),
    Column("ttft", "TTFT", least_px=132),
    Column("itl", "longest gap", least_px=132),
    Column("step_time", "of step time, %", decimals=1),
    Column("tokens", "of tokens, %", decimals=1),
    Column("kv", "of KV cache, %", decimals=1),
    Column("given", "made others wait, s", decimals=2),
    Column("received", "waited for others, s", decimals=2),
)


def layout() -> Component:
    return html.Div(
        [
            parts.place("tenants-window", at_once=True),
            parts.card("All tenants", parts.place("tenants-about", at_once=True), grid("tenants", _COLUMNS)),
            *(parts.chart(_cost(cost), title, about, 300) for cost, (title, about) in _COSTS.items()),
            parts.chart(
                _FAIRNESS,
                "How evenly step time was shared",
                "Jain's index over the tenants that had requests: 1 where all got the same, 1/n if one of n got all. "
                "It does not know who wanted more.",
                220,
            ),
            parts.card(
                "Who made others wait, and by what",
                parts.said(
                    "Seconds of stalled waits of others that are charged to each tenant: all of them, though a verdict "
                    "counts only what is beyond the usual, and passes some on."
                ),
                parts.place("balance", 80),
            ),
        ]
    )


def _cost(cost: str) -> dict[str, str]:
    return parts.time_chart(f"tenants-{cost}")


def about(scene: Scene) -> Html:
    several = len(scene.recording.names) > 1
    where = "over all replicas and all their time" if several else "over all of the trace"
    said = f"Percentiles and shares {where}; what was waited for, on {scene.replica_name}."
    return element("p", said, class_="dim")


def rows(scene: Scene) -> list[dict[str, object]]:
    """Each tenant's summary in the diagnosis, beside what it is blamed for and what it had to bear."""
    if scene.diagnosis is None:
        raise NotReadyError("no diagnosis yet")
    balance = scene.recording.view(blame_balance, scene.replica, scene.recording.waits(scene.replica_name))
    given, received = (
        dict(zip(balance.tenants, amounts.sum(axis=1).tolist(), strict=True))
        for amounts in (balance.given, balance.received)
    )
    found = []
    blamed = Counter(culprit.tenant for incident in scene.diagnosis.incidents for culprit in incident.culprits)
    for tenant in sorted(scene.diagnosis.tenants, key=lambda one: -given.get(one.tenant, 0.0)):
        values = {one.metric: words.quantile(one) for one in tenant.quantiles}
        found.append(
            {
                "tenant": words.printable(tenant.tenant),
                "blamed": words.counted(blamed[tenant.tenant], "incident") if tenant.tenant in blamed else "",
                "source": words.printable(tenant.source) if tenant.source else "not said",
                "requests": tenant.requests,
                "ttft": values.get("ttft", ""),
                "itl": values.get("itl", ""),
                "step_time": round(100 * tenant.step_time_share, 1),
                "tokens": round(100 * tenant.token_share, 1),
                "kv": round(100 * tenant.kv_share, 1),
                "given": round(given.get(tenant.tenant, 0.0), 2),
                "received": round(received.get(tenant.tenant, 0.0), 2),
            }
        )
    return found


def cost(scene: Scene, of: str) -> Figure:
    """Everybody's shares of one cost."""
    view = scene.recording.view(shares, scene.replica, *scene.window, _BINS)
    spent: Spent = getattr(view, of)
    return framed(shares_figure(view, spent, scene.window, scene.incidents, scene.looks))


def fairness(scene: Scene) -> Figure:
    view = scene.recording.view(shares, scene.replica, *scene.window, _BINS)
    return framed(fairness_figure(view, scene.window, scene.incidents))


def balance(scene: Scene) -> Html:
    """Seconds that each tenant made others wait, by mechanism."""
    view = scene.recording.view(blame_balance, scene.replica, scene.recording.waits(scene.replica_name))
    order = [at for at in np.argsort(-view.given.sum(axis=1), kind="stable").tolist() if view.given[at].any()]
    if not order:
        return parts.nothing("Nobody: no request of one tenant was stalled by another.")
    headings = ["tenant", "in all", *view.mechanisms]
    return pieces.table(
        headings,
        [
            [
                pieces.name(view.tenants[at]),
                words.duration(float(view.given[at].sum())),
                *(words.duration(one) if one > 0 else "" for one in view.given[at].tolist()),
            ]
            for at in order
        ],
        names=1,
    )


PAGE = Page(
    "/tenants",
    "Tenants",
    layout,
    (
        Part("tenants-window", window.replica_and_stretch),
        Part("tenants-about", about),
        Part("tenants", rows, "rowData"),
        *(Part(_cost(of), partial(cost, of=of), "figure") for of in _COSTS),
        Part(_FAIRNESS, fairness, "figure"),
        Part("balance", balance),
    ),
)
