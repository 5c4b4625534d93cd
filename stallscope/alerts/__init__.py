"""Alerts: rules on what a watch, or an engine itself, exposes; the proof that they work; boards of the same metrics."""
