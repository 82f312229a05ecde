"""A storm of faults in one training run on a Ray cluster of this machine, compared with an undisturbed run.

Knows faults, their injection and the required reaction; does not know how a run recovers.
"""
