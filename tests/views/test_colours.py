"""Tenants' looks: the same in every trace, told apart with any eyes and on any page, and never by colour alone."""

from __future__ import annotations

import re
from collections import Counter
from importlib.resources import files

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stallscope.diagnosis.timeline import Floats
from stallscope.views.colours import GREY, Look, colours

COLOURS, LOOKS = 10, 420
NO_TENANTS = (
    "(other)", "(others)", "(unknown)", "(cached)", "(own)", "(engine)", "(frontend)", "(telemetry)",
)  # fmt: skip
MANY = [f"tenant-{number}" for number in range(200)]
PALETTE = sorted({look.colour for look in colours(MANY).values()})
GREYS = sorted({look.colour for look in colours(NO_TENANTS).values()})
RED = "#e5484d"  # of incidents

# What people see who lack one kind of cones, in linear RGB: Machado, Oliveira, Fernandes 2009, at full severity.
EYES = {
    "all cones": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)  # of linear sRGB
names = st.sets(st.text(max_size=6), max_size=40)


def linear(colour: str) -> Floats:
    """Linear RGB of #rrggbb, as the standard for sRGB has it."""
    coded = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)


def lab(colour: str, eyes: str = "all cones") -> Floats:
    """L*, a*, b* (CIE 1976, D65) of a colour as it looks to such eyes."""
    seen = np.clip(EYES[eyes] @ linear(colour), 0, 1)
    relative = XYZ @ seen / XYZ.sum(axis=1)
    x, y, z = np.where(relative > (6 / 29) ** 3, np.cbrt(relative), relative * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def distance(one: str, other: str, eyes: str = "all cones") -> float:
    return float(np.linalg.norm(lab(one, eyes) - lab(other, eyes)))


def contrast(one: str, other: str) -> float:
    """As WCAG 2 has it."""
    low, high = sorted(float(XYZ[1] @ linear(colour)) + 0.05 for colour in (one, other))
    return high / low


def pages() -> list[str]:
    """Backgrounds of the report, light and dark."""
    style = (files("stallscope.reports") / "page" / "page.css").read_text(encoding="utf-8")
    found = re.findall(r"--(?:ground|raised): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\)", style)
    return [page for pair in found for page in pair]


# --- which tenant looks how ---------------------------------------------------------------------------------------


def test_a_look_is_the_same_on_every_machine_and_in_every_version() -> None:
    assert colours(["chat"]) == {"chat": Look("#5182c7", "solid", "circle")}


@given(names)
def test_a_tenant_keeps_its_colour_in_another_trace_where_nobody_else_has_it(tenants: set[str]) -> None:
    alone = {tenant: colours([tenant])[tenant] for tenant in tenants}
    taken = Counter(look.colour for look in alone.values())
    apart = [tenant for tenant in sorted(tenants) if taken[alone[tenant].colour] == 1]
    assert colours(apart) == {tenant: alone[tenant] for tenant in apart}


def test_most_tenants_look_as_they_do_alone_whoever_else_is_in_the_trace() -> None:
    alone = {tenant: colours([tenant])[tenant] for tenant in MANY}
    for most, share in ((4, 0.8), (8, 0.6), (25, 0.7)):
        traces = [MANY[at : at + most] for at in range(0, len(MANY), most)]
        same = [look == alone[tenant] for trace in traces for tenant, look in colours(trace).items()]
        assert np.mean(same) > share


@given(st.lists(st.text(max_size=6)))
def test_looks_do_not_depend_on_the_order_of_tenants(tenants: list[str]) -> None:
    looks = colours(tenants)
    assert looks.keys() == set(tenants)
    assert colours(sorted(tenants)) == looks == colours([*reversed(tenants), *tenants])


@given(names)
def test_no_colour_is_shared_before_all_are_used_and_none_by_many_more_than_another(tenants: set[str]) -> None:
    looks = colours(tenants)
    real = tenants - set(NO_TENANTS)
    used = Counter(looks[tenant].colour for tenant in real)
    assert max(used.values(), default=0) <= -(-len(real) // COLOURS)
    assert len({looks[tenant] for tenant in real}) == len(real)


def test_420_tenants_all_look_different_and_more_still_have_a_look() -> None:
    tenants = [f"tenant-{number}" for number in range(LOOKS + 80)]
    assert len(set(colours(tenants[:LOOKS]).values())) == LOOKS
    assert len(colours(tenants)) == LOOKS + 80


@pytest.mark.parametrize("culprit", ["archive", "batch", "reasoner", "reports"])
def test_tenants_of_the_sample_traces_are_apart_by_colour_dash_and_marker(culprit: str) -> None:
    trace = ["chat", "search", culprit]
    looks = colours(trace)
    assert looks == {tenant: colours([tenant])[tenant] for tenant in trace}
    for part in ("colour", "dash", "marker"):
        assert len({getattr(look, part) for look in looks.values()}) == 3


def test_who_is_no_tenant_is_grey_with_a_hollow_marker() -> None:
    looks = colours([*NO_TENANTS, *MANY])
    for name in NO_TENANTS:
        assert np.hypot(*lab(looks[name].colour)[1:]) < 8
        assert looks[name].marker.endswith("-open")
    assert looks["(others)"] == looks["(other)"] == GREY
    assert len(set(colours(NO_TENANTS).values())) == len(NO_TENANTS) - 1
    assert not {looks[name].colour for name in MANY} & set(GREYS)
    assert colours(["(batch)"])["(batch)"].colour in PALETTE


def test_a_name_that_is_no_unicode_has_a_look_too() -> None:
    assert colours(["\ud800"])["\ud800"].colour in PALETTE


# --- what eyes can tell -------------------------------------------------------------------------------------------


def test_distances_are_measured_in_cielab() -> None:
    np.testing.assert_allclose(lab("#ff0000"), [53.24, 80.09, 67.20], atol=0.02)
    for eyes in EYES:
        np.testing.assert_allclose(lab("#ffffff", eyes), [100, 0, 0], atol=0.02)


@pytest.mark.parametrize("eyes", EYES)
def test_any_eyes_tell_the_colours_of_tenants_apart_and_from_the_greys(eyes: str) -> None:
    least = 26 if eyes == "all cones" else 14
    assert len(PALETTE) == COLOURS
    for at, colour in enumerate(PALETTE):
        assert min([distance(colour, other, eyes) for other in PALETTE[at + 1 :]], default=least) >= least
        assert min(distance(colour, grey, eyes) for grey in GREYS) >= 13


@pytest.mark.parametrize("page", pages())
def test_colours_stand_out_from_the_light_and_the_dark_page(page: str) -> None:
    assert len(pages()) == 4
    assert [colour for colour in [*PALETTE, *GREYS] if contrast(colour, page) < 3] == []


def test_no_tenant_is_of_the_red_of_incidents() -> None:
    assert min(distance(colour, RED) for colour in PALETTE) > 40
