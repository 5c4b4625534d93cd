"""OTLP in every form to spans: the first stop of the flow.

``sources`` says what a trace's name stands for (files, globs, standard input, URLs: ``remote``, tracing backends:
``backends``); ``files`` undoes compression; ``json`` and ``protobuf`` turn bytes into ``Span`` objects (``spans``);
``reader`` looks at what a source holds and puts them together. Only here, in ``decode``, and in
``formats`` and ``frontends``, which make spans of others ours, does Python loop over spans.
"""

from stallscope.trace.otlp.reader import Progress, Reader
from stallscope.trace.otlp.sources import Source, find_sources, recent_sources, shown
from stallscope.trace.otlp.spans import Attributes, Resource, Span, SpanGroup, Value

__all__ = [
    "Attributes",
    "Progress",
    "Reader",
    "Resource",
    "Source",
    "Span",
    "SpanGroup",
    "Value",
    "find_sources",
    "recent_sources",
    "shown",
]
