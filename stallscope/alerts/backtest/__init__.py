"""Alert rules run over traces by Prometheus itself: what they catch, how soon, and what they page for nothing.

Rules (``rulefile``) and a trace's samples (``timeline``) → promtool's unit tests (``unittests``, ``promtool``) → what
fired (``firing``) → held against the incidents (``judge``), thresholds raised where asked (``tuning``) → ``report``.
"""

from stallscope.alerts.backtest.result import Backtest, backtest
from stallscope.alerts.backtest.rulefile import read_rules
from stallscope.alerts.backtest.timeline import Timeline

__all__ = ["Backtest", "Timeline", "backtest", "read_rules"]
