"""The parts of `tools/bench_kernels.py`: inputs, timing, the columns compared, tables and plot."""
