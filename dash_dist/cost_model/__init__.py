"""Predicted cost of moving K and V between ranks: one model for `exchange="auto"`, the planner and the benchmarks.

Knows links, grids of nodes and byte counts; does not know torch, models or runs.
"""
