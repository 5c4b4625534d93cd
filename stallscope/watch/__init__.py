"""Live diagnosis: watches spans as they come, and keeps score of who stalls whom in metrics.

Flow: spans -> ``watch``, with a ``replica`` each: windows (``stream``), what was spent and waited in them (``tally``,
``costs``), what is unusual (``usual``), a stall that is looked into (``case``) by the latest minutes (``memory``) ->
``scores``, within a budget of series (``seats``, ``series``) -> ``exposition`` or ``otlp``. A collector feeds it what
it has made durable, from another process (``changes``); a ``rehearsal`` feeds it a recorded trace in virtual time, and
gives the ``samples`` that a scraper would have seen. ``families`` says what is exposed.
"""
