"""What is done with one portion, wherever: the map of a map and reduce; the reduce is ``diagnosis.partial.merge``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa

from stallscope.diagnosis.diagnose import Options, diagnose_portion, seen_in
from stallscope.diagnosis.partial import Partial, merge
from stallscope.errors import UsageError
from stallscope.fleet.plan import Task
from stallscope.trace import Trace
from stallscope.trace.cut import cut
from stallscope.trace.stored import StoredTables

Progress = Callable[[float], None]  # hears the share of the tasks that are done
Scheduler = Callable[[Sequence[Task], Options, Progress], Partial]  # the sum of what ``diagnose_task`` says of each


def diagnose_task(task: Task, options: Options) -> Partial:
    """What a portion says; where its files can't be read, that."""
    # As many tasks run as there are cores.
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    trace = Trace(StoredTables(task.folder, task.parts), task.source)
    try:
        seen = seen_in(trace, task.counted)
        part = trace if task.view == (None, None) else cut(trace, *task.view)
        return seen if part is None else merge(seen, diagnose_portion(part, task.portion, options))
    except UsageError as error:
        return Partial(failures=((task.name, str(error)),), failed=1)
