"""Portions diagnosed by the workers of a Dask cluster, and added up there; only the sum comes back.

Every worker must see the dataset under the same path, and have the same version of stallscope.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stallscope.diagnosis.diagnose import Options
from stallscope.diagnosis.partial import Partial, merged
from stallscope.errors import StallscopeError, UsageError
from stallscope.fleet.plan import Task
from stallscope.fleet.work import Progress, diagnose_task

if TYPE_CHECKING:
    from distributed import Client

FAN_IN = 16  # sums that are added at a time: what a worker holds of them
_PATIENCE = "20s"


@dataclass(frozen=True)
class DaskCluster:
    """A ``Scheduler``: the cluster whose Dask scheduler has this ``address`` (tcp://host:8786)."""

    address: str

    def __call__(self, tasks: Sequence[Task], options: Options, progress: Progress) -> Partial:
        """Raises UsageError where Dask isn't installed, nobody answers, or workers lack stallscope; StallscopeError
        where workers or the scheduler are lost."""
        with _client(self.address) as client:
            from distributed import KilledWorker, as_completed
            from distributed.client import FutureCancelledError

            try:
                # Pure by default: the same call again, of a dataset that has changed since, would get the old answer.
                futures = client.map(diagnose_task, tasks, options=options, pure=False)
                for done, _ in enumerate(as_completed(futures), start=1):
                    progress(done / len(tasks))
                while len(futures) > 1:
                    groups = [futures[first : first + FAN_IN] for first in range(0, len(futures), FAN_IN)]
                    futures = [client.submit(merged, group, pure=False) for group in groups]
                total: Partial = futures[0].result()
            except KilledWorker as error:
                raise StallscopeError(
                    f"the cluster at {self.address} lost one worker after the other with the same portion, most likely "
                    "for want of memory; give its workers more"
                ) from error
            except ImportError as error:
                raise UsageError(
                    f"the workers at {self.address} lack {error.name}: install this stallscope on all of them"
                ) from error
            except (OSError, FutureCancelledError) as error:
                raise StallscopeError(f"the connection to the Dask scheduler at {self.address} was lost") from error
        return total


@contextmanager
def _client(address: str) -> Iterator[Client]:
    """Connected to a cluster that has workers; what was submitted ends with it."""
    try:
        from distributed import Client
    except ModuleNotFoundError as error:
        raise UsageError("Dask is not installed: pip install 'stallscope[scale]'") from error
    try:
        client = Client(address, timeout=_PATIENCE)
    except (OSError, ValueError) as error:
        raise UsageError(f"no Dask scheduler answers at {address}; start one with `dask scheduler`") from error
    with client:
        if not client.scheduler_info()["workers"]:
            raise UsageError(f"the Dask scheduler at {address} has no workers; start some with `dask worker {address}`")
        yield client
