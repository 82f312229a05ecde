"""The doctor under faults made on purpose."""
