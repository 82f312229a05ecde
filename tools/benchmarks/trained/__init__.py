"""Kernels on the queries, keys and values of a model that was trained for a few minutes."""
