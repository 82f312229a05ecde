"""Runs on a Ray cluster: how ranks are placed, started, watched, started again, and how a run is submitted.

Knows Ray; does not know what a training step is. Nothing here imports Ray before `environment.prepare` has been called.
"""
