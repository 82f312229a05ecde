"""The same model trained by DeepSpeed's ZeRO: `engine: deepspeed`.

Knows DeepSpeed, and the model of `dash_dist.megatron`. Does not know where batches come from, nor the files of a run.

Nothing is imported here: a configuration is checked (`config`) without DeepSpeed and torch.
"""
