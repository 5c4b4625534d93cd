"""A whole backtest: rules, what became of every incident on every timeline, and whether that is proof."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stallscope.alerts.backtest.figures import Calm, Share, calm, share
from stallscope.alerts.backtest.firing import Run, evaluate
from stallscope.alerts.backtest.judge import Answer, Fate, Outcome, Verdict, judge
from stallscope.alerts.backtest.provable import Reads, reads
from stallscope.alerts.backtest.rulefile import Alert, RuleFile
from stallscope.alerts.backtest.timeline import Timeline
from stallscope.alerts.backtest.tuning import Tuning, pages, tune, whole
from stallscope.errors import UsageError

WITHIN_S = 60.0  # the latency budget: a page within this of a lasting stall's start


@dataclass(frozen=True)
class Backtest:
    """``rules`` are those that were judged: with ``tuning``, the tuned ones. ``quiet``: runs where no page may be."""

    rules: RuleFile
    reads: Reads
    within_s: float
    verdicts: tuple[Verdict, ...]
    quiet: tuple[Run, ...]
    tuning: Tuning | None

    @property
    def required(self) -> list[Fate]:
        """The incidents that a page must catch."""
        return [fate for verdict in self.verdicts for fate in verdict.fates if fate.required]

    @property
    def in_time(self) -> list[Fate]:
        return [fate for fate in self.required if fate.answer is Answer.CAUGHT]

    @property
    def missed(self) -> list[Fate]:
        return [fate for fate in self.required if fate.answer in (Answer.MISSED, Answer.LATE)]

    @property
    def not_provable(self) -> list[Fate]:
        return [fate for fate in self.required if fate.answer is Answer.NOT_PROVABLE]

    @property
    def share_in_time(self) -> Share | None:
        """Of the incidents that a page must catch and of which that can be told; None where there are none."""
        return share(len(self.in_time), len(self.in_time) + len(self.missed))

    @property
    def calm(self) -> Calm:
        """Outside of incidents, and the false pages then."""
        false = [
            judged
            for verdict in self.verdicts
            for judged in verdict.firings
            if judged.outcome is Outcome.FALSE and self.rules.alerts[judged.firing.alert].is_page
        ]
        return calm(sum(verdict.calm_s for verdict in self.verdicts), len(false))

    @property
    def quiet_calm(self) -> Calm:
        """All of the quiet traces, and all pages on them."""
        return pages(self.rules, [whole(run) for run in self.quiet])

    @property
    def found(self) -> bool:
        """An incident that had to be caught was not, or there was a page on a quiet trace."""
        return bool(self.missed or self.quiet_calm.pages)

    @property
    def unprovable_quiet(self) -> bool:
        """There are quiet traces, and a page of which nothing can be told on any of them, or no page at all."""
        page_rules = [alert for alert in self.rules.alerts if alert.is_page]
        return bool(self.quiet) and not any(not run.reasons[alert.number] for alert in page_rules for run in self.quiet)

    @property
    def conclusive(self) -> bool:
        """What was asked can be told: there was something to catch, and all of it can be told; and so of quiet."""
        caught = bool(self.required) and not self.not_provable if self.verdicts else True
        return caught and not self.unprovable_quiet

    def reason(self, alert: Alert) -> str:
        """Why nothing of an alert can be told, on the longest timeline; "" where on any of them something can."""
        if any(not run.reasons[alert.number] for run in self.runs):
            return ""
        return max(self.runs, key=lambda run: run.grid.length_s).reasons[alert.number]

    @property
    def runs(self) -> list[Run]:
        return [*(verdict.run for verdict in self.verdicts), *self.quiet]


def backtest(
    rules: RuleFile,
    timelines: Sequence[Timeline],
    quiet: Sequence[Timeline] = (),
    *,
    tuned: bool = False,
    within_s: float = WITHIN_S,
    progress: Callable[[float], None] | None = None,
) -> Backtest:
    """Runs rules over timelines; ``quiet``: those on which no page may fire, ``tuned``: raise thresholds until then.

    ``progress`` is told the share done. Raises UsageError where a rule can't be evaluated or promtool is missing,
    InconclusiveError where a timeline is too short or too long.
    """
    if tuned and not quiet:
        raise UsageError("tuning needs traces on which the rules are to be quiet; give --quiet-on TRACE")
    read = reads(rules)
    steps = len(timelines) + len(quiet) * (2 if tuned else 1)
    done = 0

    def run(timeline: Timeline) -> Run:
        nonlocal done
        made = evaluate(rules, read, timeline)
        done += 1
        if progress is not None:
            progress(done / steps)
        return made

    still = [run(timeline) for timeline in quiet]
    tuning = None
    if tuned:
        rules, read, still, tuning = tune(rules, still)
    verdicts = tuple(judge(rules, run(timeline), within_s) for timeline in timelines)
    return Backtest(rules, read, within_s, verdicts, tuple(still), tuning)
