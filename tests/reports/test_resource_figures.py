"""Figures of resources and load: layers and rows are those of the views, and names are only text."""

from __future__ import annotations

import numpy as np
import orjson
import pytest

from stallscope.reports.figures import engine_load_figure, resource_figure
from stallscope.views.engine_load import engine_load
from stallscope.views.resources import Resource, resources
from tests.diagnosis.runs import only_replica
from tests.reports.examples import HOSTILE, hostile_trace
from tests.views.recordings import diagnosed, replica


def drawn(figure: dict[str, object]) -> dict[str, list[dict[str, object]]]:
    """What a browser is given."""
    found: dict[str, list[dict[str, object]]] = orjson.loads(orjson.dumps(figure, option=orjson.OPT_SERIALIZE_NUMPY))
    return found


def span() -> tuple[int, int]:
    r = replica()
    return int(r.timeline.before[0]), int(r.timeline.end[-1])


@pytest.mark.parametrize("resource", Resource)
def test_layers_of_a_resource_are_what_its_tenants_held(resource: Resource) -> None:
    view = resources(replica(), resource, *span(), 40)
    figure = drawn(resource_figure(view, span(), diagnosed().incidents, {}))
    assert [one["name"] for one in figure["data"]] == list(view.tenants)
    assert [one["y"] for one in figure["data"]] == np.round(view.values, 1).tolist()
    lines = [one["y0"] for one in figure["layout"]["shapes"] if one["type"] == "line"]  # type: ignore[call-overload]
    assert lines == ([view.capacity] if view.capacity else [])


def test_a_queue_is_a_line_over_the_layers() -> None:
    view, queue = (resources(replica(), one, *span(), 40) for one in (Resource.KV, Resource.QUEUE))
    line = drawn(resource_figure(view, span(), (), {}, queue))["data"][-1]
    assert (line["name"], line["y"]) == ("requests waiting", queue.total.tolist())
    assert "stackgroup" not in line


def test_tenants_of_a_resource_are_named_without_markup() -> None:
    view = resources(only_replica(hostile_trace()), Resource.SLOTS, *span(), 40)
    assert set(view.tenants) == set(HOSTILE)
    for layer in drawn(resource_figure(view, span(), (), {}))["data"]:
        assert not set(str(layer["name"])) & set("<>$\n")


def test_load_has_a_line_for_what_the_trace_tells() -> None:
    view = engine_load(replica(), *span(), 40)
    figure = drawn(engine_load_figure(view, span(), diagnosed().incidents))
    lines = {one["name"]: one for one in figure["data"]}
    assert set(lines) == {"time in steps", "KV cache in use", "output tokens/s", "prefill tokens/s"}
    assert lines["KV cache in use"]["y"] == view.kv_share.tolist()
    assert [lines[name]["yaxis"] for name in ("time in steps", "KV cache in use", "output tokens/s")] == [
        "y",
        "y2",
        "y3",
    ]
    assert len(figure["layout"]["shapes"]) == len(diagnosed().incidents)
