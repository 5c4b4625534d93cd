"""What would have been: the recorded arrivals run again through the engine's own scheduler, in virtual time.

Flow: ``step_cost`` (what a batch takes) and ``disturbances`` (what no batch explains), both learnt from the recording →
``history`` (the requests, and how they stood at any step) → ``usual`` (the same requests with tenants as usual, held to
their share, or left out) → ``run`` (one replay) → ``check`` (does an unchanged replay reproduce the recording?) →
``interventions`` (many replays of one incident, compared).
"""
