"""The anatomy of a training step: a few steps under PyTorch's profiler, and a table of where their time goes.

trace.py       the activities of a device in a trace
flops.py       operations and bytes of an activity, from the shapes of its tensors
parts.py       the parts of a step, and the rules that find the part of an activity
intervals.py   who has the device at each moment
anatomy.py     a trace as rows
steps.py       a run's engine and data, and its steps under the profiler
table.py       the rows as text
command.py     `dash-dist profile`
"""
