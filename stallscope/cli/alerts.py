"""The commands on alert rules: export, and the proof that they work (``backtesting``)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stallscope.alerts.choices import FOLDER, RUNBOOKS, TEAM, Format, Pack
from stallscope.cli.backtesting import backtest
from stallscope.cli.shared import check_new, progress, write
from stallscope.errors import StallscopeError, UsageError

if TYPE_CHECKING:
    from stallscope.alerts.thresholds import Teacher
    from stallscope.diagnosis.slo import Slo

app = typer.Typer(
    name="alerts",
    help="Alert rules on who stalls whom, and the proof that they work.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


app.command(epilog="Example: stallscope alerts backtest rules.yaml stall.otlp.jsonl.zst --quiet-on healthy.parquet")(
    backtest
)


@app.command(
    epilog="Example: stallscope alerts export --from calm.parquet --slo ttft=500ms@p99 -o stallscope.rules.yml"
)
def export(
    calm: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="TRACE", help="Traffic whose calm stretches set the thresholds; by default, floors."
        ),
    ] = None,
    from_prometheus: Annotated[
        str | None, typer.Option(metavar="URL", help="Or the last day of a running Prometheus: http://127.0.0.1:9090.")
    ] = None,
    slo: Annotated[
        list[str] | None,
        typer.Option(help="ttft=500ms@p99, or chat:itl=100ms@p99, for burn rates by tenant; may be given again."),
    ] = None,
    output: Annotated[
        Format,
        typer.Option("--format", help="A rule file, a PrometheusRule for Kubernetes, or Grafana's own alerting."),
    ] = Format.PROMETHEUS,
    pack: Annotated[
        Pack, typer.Option(help="Rules on the collector's metrics, on those of vLLM and SGLang alone, or both.")
    ] = Pack.BLAME,
    team: Annotated[str, typer.Option(help="The label team of every alert.")] = TEAM,
    trace_folder: Annotated[
        str, typer.Option(metavar="FOLDER", help="Where collect writes: for the command that opens an incident.")
    ] = FOLDER,
    runbooks: Annotated[str, typer.Option(metavar="URL", help="Where docs/runbooks/ can be read.")] = RUNBOOKS,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write; by default, stdout.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT if it exists.")] = False,
) -> None:
    """Write alert rules for Prometheus or Grafana, with thresholds from calm traffic and their reasons."""
    from stallscope.alerts.export import export as made
    from stallscope.alerts.promtool import check_rules, is_installed
    from stallscope.alerts.rules import Owner
    from stallscope.alerts.slo import objectives
    from stallscope.diagnosis.slo import parse_slo

    if out is not None:
        check_new(out, force)
    if calm is not None and from_prometheus is not None:
        raise UsageError("--from and --from-prometheus: thresholds come from one of them; give one")
    owner = Owner(_text("--team", team), _text("--runbooks", runbooks), _text("--trace-folder", trace_folder))
    slos = [parse_slo(text) for text in slo or ()]
    objectives(slos)  # before any work
    written = made(_teacher(calm, from_prometheus, slos), slos, owner, pack, output)
    if is_installed():
        try:
            check_rules(written.checkable, "the rules")
        except UsageError as error:  # they were made here
            raise StallscopeError(f"promtool refuses what was made, please report that: {error}") from error
    else:
        typer.echo(
            "warning: promtool is not installed (Debian's package prometheus has it) and has not checked the rules",
            err=True,
        )
    for note in written.notes:
        typer.echo(f"note: {note}", err=True)
    write(written.text, out, f"{len(written.rules)} alerts")


def _teacher(calm: Path | None, from_prometheus: str | None, slos: list[Slo]) -> Teacher:
    """What thresholds are learned from."""
    from stallscope.alerts.thresholds import FromSamples, NoTeacher

    if from_prometheus is not None:
        from stallscope.alerts.history import FromPrometheus

        return FromPrometheus(from_prometheus)
    if calm is None:
        return NoTeacher()
    from stallscope.alerts.backtest.timeline import rehearsed

    with progress("watching it as it would have been") as advance:
        timeline = rehearsed(str(calm), slos, advance)
    return FromSamples(timeline.samples, timeline.incidents)


def _text(option: str, text: str) -> str:
    """What can stand in a file of UTF-8; the shell may hand over other bytes."""
    if not text:
        raise UsageError(f"{option} is empty; leave it out for the default")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{option} {text!r} is no valid UTF-8") from error
    return text
