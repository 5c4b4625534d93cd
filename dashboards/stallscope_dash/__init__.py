"""The Dash app: draws what ``stallscope.views`` computes, on a trace file or live."""
