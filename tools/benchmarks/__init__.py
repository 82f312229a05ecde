"""Benchmarks, each a command: `python -m tools.benchmarks.NAME`."""
