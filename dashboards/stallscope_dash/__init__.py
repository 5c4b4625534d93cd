"""The Dash app: draws what ``stallscope.views`` computes and the diagnosis says, on a trace file or live.

Flow: the URL (``address``) and what was read (``recording``) make a ``scene``; a page in ``pages`` is a layout and its
parts, each a function from the scene to a figure (``figures``) or to components (``parts``); ``app`` binds parts to
the browser, ``security`` says who may look and what a page may run, ``command`` starts it all.
"""
