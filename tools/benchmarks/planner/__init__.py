"""Accuracy of `dash-dist plan` against measured runs."""
