"""Measurements as ratios of two things run by turns in one process: `python -m tools.bench NAME [--json] [key=value ...]`."""
