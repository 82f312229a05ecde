"""A storm of faults over one training run on a Ray cluster of this machine, and the proof that it did not matter.

Knows faults, how they are made and what must follow; does not know how a run recovers.
"""
