"""Curves of a run against a profile of the same steps, and the cost of logging them."""
