"""Checkpoints as files: which folders there are, whether their content is whole, and whether it is safe to read.

Knows one machine's view of the files; does not know ranks, the training loop, nor what the engine put inside.
"""
