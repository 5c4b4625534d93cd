"""Live diagnosis: watches spans as they come, and keeps score of who stalls whom in metrics.

A collector feeds it what it has made durable; a rehearsal feeds it a recorded trace in virtual time. ``families`` says
what is exposed, ``samples`` what a scraper saw of it.
"""
