"""From a trace to who stalled whom: incidents, the exact partition of time, charges, and a verdict.

Flow: ``replica`` (codes and arrays) → ``timeline`` (slices and gaps) → ``cost_model`` and ``ledger`` (what each step
cost, by holder) → ``lives`` (what each request was doing) and ``partition`` (where each instant of it went) →
``incidents`` (waits beyond the usual) →
``load`` (how unusual a tenant was) → ``verdict`` and its ``evidence`` → ``diagnose``, which returns the one result,
``model.Diagnosis``. Replay, which will check a verdict by running the recorded arrivals again without the culprit,
belongs between ``load`` and ``verdict``.
"""

from stallscope.diagnosis.diagnose import diagnose
from stallscope.diagnosis.model import Diagnosis, Verdict

__all__ = ["Diagnosis", "Verdict", "diagnose"]
