"""How tenants look: the same colour, dash and marker on every page and in every report, and never colour alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

from stallscope.diagnosis.replica import OTHER
from stallscope.trace.reserved import UNKNOWN
from stallscope.views.waterfall import ENGINE, FRONTEND, OWN, TELEMETRY
from stallscope.views.words import OTHERS


@dataclass(frozen=True)
class Look:
    """``colour`` (#rrggbb), ``dash`` of lines ("solid", or lengths of strokes and breaks), symbol of the ``marker``."""

    colour: str
    dash: str
    marker: str


# Found by search: as far apart as they can be for who lacks a kind of cones, all at least 3:1 against a light and
# against a dark page, and none near the red of incidents.
_PALETTE = (
    "#7d643a", "#3b7559", "#a97db1", "#927af2", "#ab8a12", "#9f5810", "#69973f", "#18a16c", "#5182c7", "#a73b9f",
)  # fmt: skip
# With short breaks: of the usual dashes, a line that jumps from bin to bin leaves only scraps.
_DASHES = ("6px,2px", "14px,3px", "2px,2px", "solid", "9px,2px,2px,2px", "6px,2px,2px,2px,2px,2px")
_MARKERS = ("cross", "circle", "star", "square", "diamond", "triangle-up", "x")
_PERSON = b"ttft"  # under which the tenants of the sample traces keep apart
_STYLES = tuple((dash, marker) for marker in _MARKERS for dash in _DASHES)

_LIGHT_GREY, _DARK_GREY = "#8b8f98", "#6a6e77"
GREY = Look(_LIGHT_GREY, "2px,2px", "circle-open")
_NO_TENANTS = {
    OTHER: GREY,
    OTHERS: GREY,
    "(cached)": Look(_LIGHT_GREY, "6px,2px", "diamond-open"),
    OWN: Look(_LIGHT_GREY, "solid", "cross-open"),
    UNKNOWN: Look(_DARK_GREY, "6px,2px", "square-open"),
    ENGINE: Look(_DARK_GREY, "solid", "x-open"),
    FRONTEND: Look(_DARK_GREY, "2px,2px", "triangle-up-open"),
    TELEMETRY: Look(_DARK_GREY, "14px,3px", "star-open"),
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
    digest = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8, person=_PERSON)
    return int.from_bytes(digest.digest())


def _take_place(taken: list[int], wanted: int, places: int) -> int:
    """The first from ``wanted`` on, around the end, of which fewer than ``places`` are taken; takes one."""
    count = len(taken)
    found = next(at for at in ((wanted + step) % count for step in range(count)) if taken[at] < places)
    taken[found] += 1
    return found
