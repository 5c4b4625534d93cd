"""The engine behind an OpenAI-compatible HTTP API.

Flow of a request: ``app`` (one ASGI application) asks ``tenants`` who it is and ``asked`` what it wants, hands it to
``async_engine`` (the engine's own thread), and writes what comes back in the words of ``answers``. ``delivery`` holds
a request's telemetry until its answer has left, ``metrics`` counts for Prometheus, ``tokens`` is between text and
token ids, and ``serve`` is the process around it all: socket, signals, drain.
"""
