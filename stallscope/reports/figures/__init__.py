"""Views as Plotly figures (plain dicts, ready for JSON): drawn here once, for the HTML file and for whoever draws too.

Categories are numbers with tick texts, never names: Plotly would merge equal labels, and take some for dates. Colours
that depend on a light or dark page are left to the page.
"""

from stallscope.reports.figures.alerts import firings_figure
from stallscope.reports.figures.batch import swimlanes_figure
from stallscope.reports.figures.engine import engine_load_figure, fairness_figure, resource_figure, shares_figure
from stallscope.reports.figures.frame import Figure, Looks, Span
from stallscope.reports.figures.waits import percentiles_figure
from stallscope.reports.figures.whatif import what_if_figure

__all__ = [
    "Figure",
    "Looks",
    "Span",
    "engine_load_figure",
    "fairness_figure",
    "firings_figure",
    "percentiles_figure",
    "resource_figure",
    "shares_figure",
    "swimlanes_figure",
    "what_if_figure",
]
