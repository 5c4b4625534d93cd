"""``python -m stallscope.cli``: the command line without an installed script."""

from stallscope.cli import main

main()
