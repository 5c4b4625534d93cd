"""Alerts: rules for Prometheus and Grafana on what a watch, or an engine itself, exposes."""
