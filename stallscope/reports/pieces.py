"""Pieces of pages, escaped: the answer, an incident, who waited for whom, a request's time, what would help.

The HTML file and the dashboard put the same pieces together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from stallscope.diagnosis.model import Diagnosis, Incident, Intervention, Verdict
from stallscope.reports.markup import Html, element, joined
from stallscope.views import words
from stallscope.views.blame import Blame
from stallscope.views.waterfall import NO_TENANTS, OWN, Waterfall

_ROWS = 30  # of a waterfall, the longest
_LONGEST_NAME = 64


# --- the answer ---------------------------------------------------------------------------------------------------


def answer(diagnosis: Diagnosis) -> Iterable[Html]:
    """The verdict in a sentence, how sure it is and on what, and what can be done tonight."""
    length = words.duration((diagnosis.end_ns - diagnosis.start_ns) / 1e9)
    when = f"{words.day(diagnosis.start_ns)} {words.clock(diagnosis.start_ns, zone=True)}, {length}"
    yield element(
        "header",
        verdict(diagnosis.verdict),
        element("span", f"  {diagnosis.source} · {when}", class_="dim"),
        element("h1", words.headline(diagnosis)),
        element("ul", *_facts(diagnosis), class_="facts"),
    )
    for check in diagnosis.replays:
        yield element("p", f"replay of {words.replay_line(check)}", class_="dim" if check.trusted else "note")
    for note in diagnosis.notes:
        yield element("p", f"note: {note}", class_="note")
    yield from _tonight(diagnosis)


def _facts(diagnosis: Diagnosis) -> Iterable[Html]:
    first, *rest = words.evidence(diagnosis).split(" · ")
    yield element("li", first, class_="sure")
    c = diagnosis.coverage
    doubts = c.steps_lost or c.records_dropped or c.requests_lost or c.known_tenant_share < 0.9 or c.fidelity < 3
    for fact in rest:
        yield element("li", fact, class_="doubt" if doubts and _is_doubtful(fact, diagnosis) else "")


def _is_doubtful(fact: str, diagnosis: Diagnosis) -> bool:
    """Whether a fact is one that makes the answer less sure."""
    c = diagnosis.coverage
    if fact.startswith("fidelity"):
        return c.fidelity < 3
    if "of known tenant" in fact:
        return c.known_tenant_share < 0.9
    return ("lost" in fact and "none lost" not in fact) or "dropped" in fact


def _tonight(diagnosis: Diagnosis) -> Iterable[Html]:
    """The first remedy that needs no change of the engine, where a replay predicts one that helps."""
    best = words.tonight(diagnosis)
    if best is None:
        return
    rest = f": by replay, {words.restored(best)} of what the victims lost would be gone"
    yield element(
        "p",
        element("b", "Tonight: "),
        best.what,
        rest,
        *([Html("<br>"), element("code", best.how)] if best.how else []),
        class_="now",
    )


ABOUT_BLAME = (
    "Seconds that stalled waits of each victim (rows) are charged to each holder (columns), by what mostly; own work "
    "is left out. A verdict's sums differ: it counts only what is beyond the usual, and what stood behind somebody who "
    "was held up too, it charges to whoever held that one up."
)


# --- incidents ----------------------------------------------------------------------------------------------------


def incident_facts(incident: Incident, to_request: Callable[[str], str] | None = None) -> Html:
    """Who did it, through which requests, why that is said, how sure it is, and who comes next.

    ``to_request`` gives the address of a request, where there is one.
    """
    rows: list[tuple[str, Html]] = []
    for culprit in incident.culprits:
        rows.append(("culprit", joined([name(culprit.tenant, "culprit"), words.culprit_line(culprit, incident)])))
        shown = [one for one in culprit.requests if one.share >= 0.05][:3] or list(culprit.requests[:1])
        for request in shown:
            what = (
                f": {request.prompt_tokens:,} prompt and {request.output_tokens:,} output tokens, "
                f"arrived {words.clock(request.arrival_ns)}, cost them {words.duration(request.caused_s)} "
                f"({request.share:.0%} of what its tenant did)"
            )
            kind = "request" if request.request == culprit.dominating_request else "one of"
            named = code(request.request)
            if to_request is not None:
                named = element("a", named, href=to_request(request.request))
            rows.append((kind, joined([named, what])))
    if incident.group:
        rows.append(("alike", joined([incident.group])))
    rows += [("because", joined([reason])) for reason in incident.reasons]
    rows.append(("confidence", joined([str(incident.confidence)])))
    if incident.mechanism and not incident.culprits:
        rows.append(("mechanism", joined([f"{incident.mechanism}: {words.mechanism(incident.mechanism)}"])))
    if incident.runner_up:
        rows.append(("runner-up", joined([name(incident.runner_up), f", {incident.runner_up_share:.0%}"])))
    return element("dl", *(joined([element("dt", title), element("dd", text)]) for title, text in rows))


def who(incident: Incident, most_culprits: int | None = None) -> Html:
    """Who stalled whom: of many victims the hardest hit, and all culprits or the first of them."""
    culprits = [name(culprit.tenant, "culprit") for culprit in incident.culprits[:most_culprits]]
    left = len(incident.culprits) - len(culprits)
    culprits += [Html(f"{left} more")] if left else []
    blamed = {culprit.tenant for culprit in incident.culprits}
    victims = [one.tenant for one in incident.victims]
    others = [one for one in victims if one not in blamed] or victims
    waited = words.listed([words.shortened(words.printable(one), 40) for one in others], 4)
    separated = [piece for one in culprits for piece in (", ", one)][1:]
    return joined([*separated, f" stalled {waited}"] if culprits else [f"{waited} waited"])


def victims(incident: Incident) -> Html:
    """Who waited, how much of it, and their percentiles then and usually."""
    headings = ["victim", "stalled", "lost", "TTFT", "usually", "longest gap", "usually"]
    rows = [
        [
            name(victim.tenant),
            f"{victim.stalled_requests:,} of {victim.requests:,}",
            words.duration(victim.lost_s),
            *(
                next((words.quantile(one) for one in quantiles if one.metric == metric), "-")
                for metric in ("ttft", "itl")
                for quantiles in (victim.during, victim.usual)
            ),
        ]
        for victim in incident.victims
    ]
    return table(headings, rows, names=1)


def charges(incident: Incident) -> Html:
    """Where the time went, folded away."""
    shown = [charge for charge in incident.charges if charge.share >= 0.01][:12]
    rows = [
        [
            joined([name(charge.holder), " (itself)" if charge.own else ""]),
            charge.mechanism,
            words.duration(charge.seconds),
            f"{charge.share:.0%}",
        ]
        for charge in shown
    ]
    shares = table(["charged to", "by", "seconds", "share"], rows, names=2)
    title = f"Where the {words.duration(incident.lost_s)} went"
    return element("details", element("summary", title), shares)


def blame_matrix(view: Blame) -> Html:
    """A row a victim, a column a holder; the more seconds, the deeper the red, or the grey of who is no tenant. Below,
    what the mechanisms mean."""
    most = float(view.seconds.max())
    shades = ["nobody" if holder in NO_TENANTS else "tenant" for holder in view.holders]
    head = element("tr", element("th", "victim"), *(element("th", name(holder)) for holder in view.holders))
    rows = []
    for victim, stalled, seconds, mechanisms in zip(
        view.victims, view.stalled, view.seconds, view.mechanisms, strict=True
    ):
        hit = element("small", words.counted(stalled, "stalled request"), class_="dim")
        cells = (
            _heat(float(amount), float(amount) / most, by, shade)
            for amount, by, shade in zip(seconds, mechanisms, shades, strict=True)
        )
        rows.append(element("tr", element("th", name(victim), Html("<br>"), hit), *cells))
    matrix = element("table", element("thead", head), element("tbody", *rows), class_="heat")
    named = dict.fromkeys(one for row in view.mechanisms for one in row if one)
    meanings = "; ".join(f"{one}: {words.mechanism(one)}" for one in named)
    return joined([element("div", matrix, class_="scroll", tabindex="0"), element("p", meanings, class_="dim")])


def _heat(seconds: float, share: float, mechanism: str, shade: str) -> Html:
    if seconds <= 0:
        return element("td", "", class_="cell")
    style = f"background: rgba(var(--heat-{shade}), {0.06 + 0.74 * share:.2f})"
    kind = "cell hot" if share > 0.4 else "cell"
    return element("td", words.duration(seconds), element("small", mechanism), class_=kind, style=style)


# --- a request ----------------------------------------------------------------------------------------------------


def about_request(view: Waterfall) -> Html:
    """A request's time in a sentence."""
    others = sum(part.seconds for part in view.parts if part.holder != OWN)
    first = "no token yet" if view.ttft_s is None else f"first token after {words.duration(view.ttft_s)}"
    return joined(
        [
            code(view.request),
            " of ",
            name(view.tenant),
            f" took {words.duration(view.length_s)}, {words.duration(others)} of it not its own work; {first}; "
            f"{view.prompt_tokens:,} prompt and {view.output_tokens:,} output tokens.",
        ]
    )


def falls(view: Waterfall, most: int = _ROWS) -> Html:
    """The longest stretches of a request's life, in order: what it did in each, and who is charged with it."""
    shown = sorted(sorted(view.rows, key=lambda row: -row.length_s)[:most], key=lambda row: row.offset_s)
    rows = []
    for row in shown:
        left = f"{100 * row.offset_s / view.length_s:.2f}%"
        width = f"{100 * row.length_s / view.length_s:.2f}%"
        bar = element("div", element("span", style=f"left: {left}; width: {width}"), class_="track")
        parts = [part for part in row.parts if part.seconds >= 0.1 * row.length_s][:3]
        who: list[str] = []
        for part in parts:
            who += [", " if who else "", name(part.holder), f" {part.mechanism} {words.duration(part.seconds)}"]
        cells = [
            element("td", f"{row.offset_s:.2f} s", class_="number"),
            element("td", words.duration(row.length_s), class_="number"),
            element("td", bar),
            element("td", f"{row.doing}, stalled" if row.stalled else row.doing),
            element("td", *who, class_="text"),
        ]
        rows.append(element("tr", *cells, class_="stalled" if row.stalled else ""))
    headings = [element("th", one, class_="number") for one in ("after", "for")]
    headings += [element("th", one) for one in ("", "doing", "charged to")]
    rows_of_life = element("table", element("thead", element("tr", *headings)), element("tbody", *rows), class_="falls")
    hidden = len(view.rows) - len(shown)
    more = [element("p", f"{words.counted(hidden, 'shorter row')} left out.", class_="dim")] if hidden else []
    return joined([element("div", rows_of_life, class_="scroll", tabindex="0"), *more])


# --- what would help ----------------------------------------------------------------------------------------------


def interventions(found: Sequence[Intervention]) -> Html:
    """Replays that blame rests on: what was changed, and what it would have done."""
    rows = [_intervention(one) for one in found]
    headings = ["replayed with", "excess gone", "victims and culprits", "throughput"]
    return table(headings, rows, names=1, text=(2,))


def remedies(found: Sequence[Intervention]) -> Html:
    """What would help: what can be done tonight first."""
    rows = [
        [
            "tonight" if one.tonight else "engine change",
            *_intervention(one)[:1],
            code(one.how) if one.how else "",
            *_intervention(one)[1:],
        ]
        for one in found
    ]
    headings = ["when", "remedy", "how", "excess gone", "victims and culprits", "throughput"]
    return table(headings, rows, names=2, text=(2, 4))


def _intervention(one: Intervention) -> list[str]:
    """Cells: what was changed, what it restores, whom it changes how, and throughput."""
    caveat = words.caveat(one)
    lines: list[str] = []
    for prediction in words.predictions(one):
        lines += [*([Html("<br>")] if lines else []), prediction]
    what = joined([one.what, *([Html("<br>"), element("span", caveat, class_="note")] if caveat else [])])
    return [what, words.restored(one), joined(lines), f"{one.throughput:.0%}"]


# --- small pieces -------------------------------------------------------------------------------------------------


def verdict_words(found: Verdict) -> str:
    """As it is shouted."""
    return str(found).replace("_", " ").upper()


def verdict(found: Verdict) -> Html:
    """The same, in the verdict's colour."""
    return element("span", verdict_words(found), class_=f"verdict {found}")


def name(text: str, kind: str = "") -> Html:
    """A name from the trace; in full where one points at it."""
    shown = words.shortened(words.printable(text), _LONGEST_NAME)
    return element("span", shown, class_=kind, title=text if len(text) > _LONGEST_NAME else "")


def code(text: str) -> Html:
    """What can be typed or pasted."""
    return element("code", words.printable(text))


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, names: int, text: Sequence[int] = ()) -> Html:
    """A table whose first ``names`` columns are names, those at ``text`` sentences, and the others numbers."""

    def kind(column: int) -> str:
        return "name" if column < names else "text" if column in text else "number"

    def cells(row: Sequence[str]) -> Iterable[Html]:
        # On a narrow page a row becomes a card, and each cell says what it is.
        return (
            element("td", element("div", cell), class_=kind(at), data_label=headings[at]) for at, cell in enumerate(row)
        )

    head = element("tr", *(element("th", name, class_=kind(at)) for at, name in enumerate(headings)))
    body = (element("tr", *cells(row)) for row in rows)
    table = element("table", element("thead", head), element("tbody", *body), class_="cards")
    return element("div", table, class_="scroll")
