"""Inputs, options and records that the benchmarks share."""
