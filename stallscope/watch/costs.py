"""What steps of a replica should cost, learned while it runs: the cost model of a diagnosis, fitted now and then."""

from __future__ import annotations

import numpy as np

from stallscope.diagnosis.cost_model import CostModel, fit_cost_model
from stallscope.diagnosis.ledger import features_at
from stallscope.diagnosis.timeline import Floats
from stallscope.watch.stream import Window, duration_ns

_FIT_AT = (150, 600, 2_000, 6_000)  # steps seen, and then each time that as many more were
_FIT_EVERY = 20_000
_MOST_STEPS = 3_000  # of the latest ones that it is fitted on
_FAR_BEYOND = 2.0  # times the most prefill tokens that a fitted step had: it knows nothing of such steps
_MOST_ERROR = 0.1  # median relative error from which on nothing is said of unexplained time


class Costs:
    """The cost model of one replica; none until enough steps were seen."""

    def __init__(self) -> None:
        self.model: CostModel | None = None
        self._features: list[Floats] = []
        self._durations: list[Floats] = []
        self._seen = 0
        self._next = _FIT_AT[0]
        self._most_tokens = 0.0  # of prompts in a step, as far as it was fitted on

    def learn(self, window: Window) -> None:
        """Takes a window's steps as examples."""
        features = features_at(window.rows, np.arange(len(window.ready)))
        taught = features[:, 1:].any(axis=1) & window.known
        if not taught.any():
            return
        self._features.append(features[taught])
        self._durations.append(duration_ns(window)[taught])
        self._seen += int(taught.sum())
        while sum(map(len, self._durations[1:])) >= _MOST_STEPS:
            del self._features[0], self._durations[0]
        tokens = float(features[taught, 1].max(initial=0.0))
        is_new = self.model is not None and tokens > _FAR_BEYOND * self._most_tokens
        if self._seen >= self._next or is_new:
            examples = np.concatenate(self._features)
            self.model = fit_cost_model(examples, np.concatenate(self._durations))
            self._most_tokens = float(examples[:, 1].max(initial=0.0))
            self._next = next((one for one in _FIT_AT if one > self._seen), self._seen + _FIT_EVERY)

    def unexplained_ns(self, window: Window) -> float:
        """Time of a window's steps beyond what their batches should cost; 0 while nobody can say."""
        if self.model is None or self.model.error > _MOST_ERROR:
            return 0.0
        predicted = self.model.predict(features_at(window.rows, np.arange(len(window.ready))))
        return float(np.maximum(duration_ns(window) - predicted, 0.0)[window.known].sum())
