"""What an alert says of amounts, rendered by Prometheus itself."""

from __future__ import annotations

import tempfile
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path

import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from stallscope.alerts.texts import Found, Text, Value, for_grafana, for_prometheus
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
