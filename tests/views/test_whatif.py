"""What if, side by side: every prediction is a row, and where nobody is left to wait there is no number."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stallscope.diagnosis.model import Intervention, InterventionKind, Prediction
from stallscope.views.whatif import side_by_side

TIME = st.floats(0, 100)
TENANT = st.sampled_from(["chat", "chat\0", "", "<b>", "reasoner"])


def intervention(changed: tuple[str, ...], *predictions: Prediction) -> Intervention:
    kind = InterventionKind.WITHOUT_TENANT
    return Intervention(kind, "without", "", changed, 1.0, 1.0, 1.0, predictions, 1.0, False, 0.0)


@st.composite
def answers(draw: st.DrawFn) -> Intervention:
    """A tenant of which no request is left has no time in any row."""
    gone = draw(st.sets(TENANT))
    rows = []
    for tenant in draw(st.lists(TENANT, unique=True)):
        for metric in ("ttft", "itl"):
            for quantile in (0.5, 0.9):
                low, predicted, high = sorted(draw(TIME) + (metric == "ttft") for _ in range(3))
                times = (0.0, 0.0, 0.0) if tenant in gone else (predicted, low, high)
                requests = draw(st.integers(1, 9))
                rows.append(Prediction(tenant, metric, quantile, requests, draw(TIME), draw(TIME), *times))
    return intervention(tuple(draw(st.sets(TENANT))), *rows)


@given(answers())
def test_each_row_is_its_prediction_and_nan_where_its_tenant_has_no_request_left(answer: Intervention) -> None:
    view = side_by_side(answer)
    assert all(len(getattr(view, name)) == len(answer.predictions) for name in view.__dataclass_fields__)
    for row, one in enumerate(answer.predictions):
        assert (view.tenants[row], view.metrics[row], view.quantile[row]) == (one.tenant, one.metric, one.quantile)
        assert (view.requests[row], view.changed[row]) == (one.requests, one.tenant in answer.tenants)
        assert (view.recorded_s[row], view.replayed_s[row]) == (one.recorded_s, one.replayed_s)
        predicted = (view.predicted_s[row], view.low_s[row], view.high_s[row])
        if all(other.high_s == 0 for other in answer.predictions if other.tenant == one.tenant):
            assert all(map(math.isnan, predicted))
        else:
            assert predicted == (one.predicted_s, one.low_s, one.high_s)


def test_answers_of_one_token_have_no_gaps_though_their_requests_are_there() -> None:
    rows = (
        Prediction("classify", "ttft", 0.9, 40, 2.0, 2.0, 0.5, 0.4, 0.6),
        Prediction("classify", "itl", 0.9, 40, 0.0, 0.0, 0.0, 0.0, 0.0),
    )
    np.testing.assert_array_equal(side_by_side(intervention((), *rows)).predicted_s, [0.5, 0.0])
