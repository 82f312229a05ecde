"""The parts of `tools/bench_cp.py`: ranks, timing, what is compared, overlap, predictions, tables and plot."""
