"""Meters, sinks and the report."""
