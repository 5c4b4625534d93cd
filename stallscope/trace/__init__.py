"""Reads telemetry into one `Trace` of columnar tables, and tells what it could not read.

Flow: files → spans (``otlp``) → steps, joins, request spans and samples (``decode``) → every batch, by a state
machine per replica (``rebuild``) → requests (``requests``), gaps between tokens (``gaps``), GPU samples (``gpu``) →
Arrow tables (``tables``, declared in ``schema``) → `Trace` (``model``), which checks itself (``validate``) and is
kept as Parquet (``parquet``; ``append`` adds to that, ``stored`` reads it). ``to_otlp`` writes them as spans again.
``read`` ties them together; ``batches`` expands residency to the batch of each step; ``query`` answers SQL. Where
batches are not told, ``reconstruct`` estimates them, from requests alone in ``estimated``. What others wrote comes in
beside it: other engines' spans (``plain_spans``), who sent what by a gateway's log (``tenants``), and any table of
requests (``mapping``), both read by ``foreign``.
"""

from stallscope.trace.append import append_parquet
from stallscope.trace.batches import batches
from stallscope.trace.findings import Finding
from stallscope.trace.model import Trace
from stallscope.trace.parquet import write_parquet
from stallscope.trace.read import read_trace

__all__ = ["Finding", "Trace", "append_parquet", "batches", "read_trace", "write_parquet"]
