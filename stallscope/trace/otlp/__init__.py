"""OTLP in every form to spans: the first stop of the flow.

``files`` says which files there are and undoes their compression; ``json`` and ``protobuf`` turn bytes into ``Span``
objects (``spans``); ``reader`` looks at what a file holds and puts them together. Only here, in ``decode``, and in
``formats`` and ``frontends``, which make spans of others ours, does Python loop over spans.
"""

from stallscope.trace.otlp.files import Progress, find_files
from stallscope.trace.otlp.reader import Reader
from stallscope.trace.otlp.spans import Attributes, Resource, Span, SpanGroup, Value

__all__ = ["Attributes", "Progress", "Reader", "Resource", "Span", "SpanGroup", "Value", "find_files"]
