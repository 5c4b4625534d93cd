"""Who stalled whom: reads the telemetry of an inference engine and says which tenant held up which requests.

Data flows one way, each package knowing only those before it:

``trace``      reads anything into one ``Trace`` of columnar tables
``diagnosis``  incidents, the partition of latency, charges, replay, verdict: one ``Diagnosis``
``views``      what a picture needs of it, for a window and a width
``reports``, ``alerts``, ``live``    the faces: text, HTML and JSON; rules and their tests; the receiver
``demo``, ``cli``    the demonstration, and the command line: parse, call, print

Beside them: ``workloads`` (scenarios and the recording of them, unknown to the diagnosis) and ``bench``; ``errors``
serves all. This module imports nothing, so that naming a part costs that part only.
"""

__version__ = "0.1.0"
