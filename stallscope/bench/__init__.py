"""StallBench: is a diagnosis true? Scenarios with an injected cause, truth by running them again without it, scores.

Flow: scenario files → ``cases`` (one scenario and seed, its tenants under other names, conditions made hostile) →
``truth`` (``paired`` runs with and without the cause, and under ``relaxations``) and a recorded trace → ``answers``
(what an analyzer said of the trace, or a rule of thumb: ``rivals``) → ``scores`` → ``table``. ``runner`` does it for
many cases in parallel processes; ``command`` is the command line.
"""
