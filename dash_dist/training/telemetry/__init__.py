"""Measurements of a run and the TensorBoard files that hold them.

Knows values and curves; does not know the schedule.
"""
