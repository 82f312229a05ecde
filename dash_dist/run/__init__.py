"""A run seen from outside its processes: files in its folder, events, requests, progress messages, names of curves.

Knows what is written and sent; does not know the training loop.
"""
