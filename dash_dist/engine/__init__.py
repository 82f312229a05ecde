"""Interface of an engine, the model with its optimizer, and the parts that all engines share.

Knows batches, results and statistics of a step; does not know Megatron-core or DeepSpeed.
"""
