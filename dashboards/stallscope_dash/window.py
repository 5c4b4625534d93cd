"""Which replica and which stretch of time a page shows, and the way back to all of it."""

from __future__ import annotations

from stallscope.reports.markup import Html, element, joined
from stallscope.views import words
from stallscope_dash import parts
from stallscope_dash.scene import Scene

_REPLICAS = 50  # to choose from


def replica_and_stretch(scene: Scene) -> Html:
    """A choice of replicas, where there are several, and what ``stretch`` says."""
    names = scene.recording.names[:_REPLICAS]
    links = {one: scene.address.search(replica=one, since=None, until=None) for one in names}
    choice = parts.choice("Replica", links, scene.replica_name) if len(names) > 1 else Html("")
    return joined([choice, stretch(scene)])


def stretch(scene: Scene) -> Html:
    """What the charts are zoomed to; nothing where they show all."""
    start, end = scene.window
    if (start, end) == scene.span:
        return Html("")
    shown = f"{words.clock(start)} to {words.clock(end, zone=True)} ({words.duration((end - start) / 1e9)})"
    back = parts.link("show all", scene.address.search(since=None, until=None))
    return element("p", f"Zoomed to {shown}: ", back, class_="dim zoomed")
