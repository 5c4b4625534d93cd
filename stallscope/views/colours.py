"""How tenants look: the same colour, dash and marker on every page and in every report; none is told by colour alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

from stallscope.diagnosis.replica import OTHER, UNKNOWN
from stallscope.views.blame import OTHERS
from stallscope.views.waterfall import ENGINE, FRONTEND, OWN, TELEMETRY


@dataclass(frozen=True)
class Look:
    """``colour`` (#rrggbb), ``dash`` of lines and symbol of markers, by the names that Plotly has for them."""

    colour: str
    dash: str
    marker: str


# Found by search: as far apart as they can be for who lacks a kind of cones, all at least 3:1 against a light and
# against a dark page, and none near the red of incidents.
_PALETTE = (
    "#5182c7", "#ab8a12", "#3b7559", "#a73b9f", "#69973f", "#927af2", "#9f5810", "#18a16c", "#a97db1", "#7d643a",
)  # fmt: skip
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_MARKERS = ("circle", "square", "diamond", "cross", "x", "triangle-up", "star")
_STYLES = tuple((dash, marker) for marker in _MARKERS for dash in _DASHES)

_LIGHT_GREY, _DARK_GREY = "#8b8f98", "#6a6e77"
GREY = Look(_LIGHT_GREY, "dot", "circle-open")  # of whoever is no tenant
_NO_TENANTS = {
    OTHER: GREY,
    OTHERS: GREY,
    UNKNOWN: Look(_DARK_GREY, "dash", "square-open"),
    "(cached)": Look(_LIGHT_GREY, "longdash", "diamond-open"),
    OWN: Look(_LIGHT_GREY, "solid", "cross-open"),
    ENGINE: Look(_DARK_GREY, "solid", "x-open"),
    FRONTEND: Look(_DARK_GREY, "dot", "triangle-up-open"),
    TELEMETRY: Look(_DARK_GREY, "longdash", "star-open"),
}


def colours(tenants: Iterable[str]) -> dict[str, Look]:
    """The look of each of ``tenants``, which may be given in any order: all differ, up to 420 of them.

    A look follows from a hash of the name. No colour is shared while there are as many colours as tenants; beyond that
    each has equally many places. Tenants are placed in the order of their hashes, and who finds no place in its own
    colour takes the next one with a place, so that most look the same whatever else is in a file. Names that stand for
    no tenant, such as "(others)" and "(engine)", are grey, with hollow markers.
    """
    given = set(tenants)
    hashed = sorted((_hash(name), name) for name in given - _NO_TENANTS.keys())
    places = -(-len(hashed) // len(_PALETTE))
    alike = -(-places // len(_STYLES))
    of_colour = [0] * len(_PALETTE)
    of_style = [[0] * len(_STYLES) for _ in _PALETTE]
    found = {name: _NO_TENANTS[name] for name in given & _NO_TENANTS.keys()}
    for number, name in hashed:
        style, colour = divmod(number, len(_PALETTE))
        colour = _take_place(of_colour, colour, places)
        found[name] = Look(_PALETTE[colour], *_STYLES[_take_place(of_style[colour], style, alike)])
    return found


def _hash(name: str) -> int:
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _take_place(taken: list[int], wanted: int, places: int) -> int:
    """The first from ``wanted`` on, around the end, of which fewer than ``places`` are taken; takes one."""
    count = len(taken)
    found = next(at for at in ((wanted + step) % count for step in range(count)) if taken[at] < places)
    taken[found] += 1
    return found
