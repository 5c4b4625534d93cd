"""What an alert says: amounts as Prometheus itself renders them, and the text before there is anything to render."""

from __future__ import annotations

import tempfile
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path

import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from stallscope.alerts.texts import (
    ByLabel,
    Found,
    Label,
    Percent,
    ShellWord,
    Since,
    Text,
    Value,
    cases,
    for_grafana,
    for_people,
    for_prometheus,
)
from tests.alerts.unit_tests import UnitTest, needs_promtool

amounts = st.floats(1e-4, 1e9) | st.integers(0, 10**9).map(float)
SAID: Text = (Value(), " s")
LISTED: Text = (Found("waited{of=%[1]q}", "of", "of", "nobody", valued=True),)


def plainly(amount: float) -> str:
    """Three digits, more before the point where there are, and nothing behind it that is zero."""
    exact = Decimal(amount)
    last = min(0, exact.adjusted() - 2) if amount else 0
    rounded = exact.quantize(Decimal(1).scaleb(last), ROUND_HALF_EVEN)
    text = f"{rounded:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


@needs_promtool
@example(values=[0.0, 0.0001, 0.25, 1.005, 9.995, 99.94, 99.96, 100.0, 999.5, 1000.0, 2083.4, 123456.7, 1e9])
@given(st.lists(amounts, min_size=1, max_size=30))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_an_amount_is_plain_digits_whatever_it_is(values: list[float]) -> None:
    annotations = {"said": for_prometheus(SAID), "listed": for_prometheus(LISTED)}
    rule = {"alert": "A", "expr": "waited", "annotations": annotations}
    test = UnitTest()
    expected = []
    for number, value in enumerate(values):
        test.scraped("waited", {"of": f"t{number}"}, [value] * 3)
        said = plainly(value)
        expected.append(({"of": f"t{number}"}, {"said": f"{said} s", "listed": f"t{number} {said}"}))
    test.saying(20, "A", expected)
    with tempfile.TemporaryDirectory() as folder:
        test.passes(yaml.safe_dump({"groups": [{"name": "g", "rules": [rule]}]}), Path(folder))


def test_grafana_is_given_the_same_template_over_its_own_value_and_without_a_dollar_sign() -> None:
    assert for_grafana(SAID).replace(".Values.A.Value", ".Value") == for_prometheus(SAID)
    assert "$" not in for_grafana(SAID)


def test_what_is_not_known_yet_has_its_name_in_a_text_for_people() -> None:
    text = (
        "{{ x }} ",
        Label("tenant"),
        ShellWord("--tenant", "tenant"),
        " ",
        Found("up", "", "victim", "nobody"),
        " ",
        Value(),
        Percent(),
        Since("up", "", "-20m"),
    )
    assert for_people(text) == "{{ x }} <tenant> --tenant=<tenant> <victim> <value><value><time>"


@given(st.dictionaries(st.text(min_size=1), st.text()), st.text())
def test_a_text_has_a_case_for_each_value_that_it_has_words_for_and_one_for_all_others(
    texts: dict[str, str], otherwise: str
) -> None:
    said = cases(("why: ", ByLabel("culprit", texts, otherwise), "."))
    assert dict(said) == {**{name: f"why: {text}." for name, text in texts.items()}, "": f"why: {otherwise}."}
    assert len(said) == len(texts) + 1
    assert cases((otherwise, ".")) == (("", f"{otherwise}."),)
