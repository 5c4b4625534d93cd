"""What runs inside an engine: the names of the contract, plain records of steps and requests, and their export.

Flow: an engine fills ``records`` on its own thread; ``emitter`` turns them into OpenTelemetry spans in the
background (``spans`` encodes, ``files`` writes them down). ``names`` holds every attribute with type, unit, meaning.
"""

__version__ = "0.1.0"
