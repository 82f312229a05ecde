"""Faults of a run, in the order in which they are met.

One run at a time in a folder (`lock`), attempts (`attempt`), hangs (`watchdog`), losses that cannot be trained on
(`guard`, `recovery`, `rollback`, `skipped`), and their record (`fault_log`).

Knows faults and their remedies; does not know the loop.
"""
