"""Kernels on one GPU against dense attention and the released kernels: inputs, timing, tables, plot."""
