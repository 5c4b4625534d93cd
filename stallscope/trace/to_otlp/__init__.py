"""A trace's tables back to OTLP spans, as the engine might have written them: the inverse of the reader.

``batches`` turns residency into what changed in each step, ``attributes`` rows of other tables into what spans carry,
``write`` puts them into a file. What is read of it, are the same tables.
"""

from stallscope.trace.to_otlp.write import write_otlp

__all__ = ["write_otlp"]
