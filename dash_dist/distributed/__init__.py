"""Processes of a run as a group: how they meet, and how they agree.

Knows torch.distributed; does not know models.
"""
