"""A dataset diagnosed in portions: planned (``plan``), each diagnosed by itself (``work``), and added up.

Where the portions are diagnosed is one function: on local processes (``processes``) or on a Dask cluster (``cluster``).
"""

from stallscope.fleet.dataset import diagnose_dataset

__all__ = ["diagnose_dataset"]
