"""The model, its parallelism, its optimizer and its checkpoint format, on top of Megatron-core.

Knows Megatron-core. Does not know where batches come from, nor the files of a run.
"""

import warnings

# Warnings of Megatron-core that say nothing to the users of this package: Apex and Transformer Engine are
# never used, the optimizer looks at the gradient of its (non-leaf) shards on purpose, and it calls parts of
# torch that have newer names.
for _message, _module in (
    (r"(Transformer Engine and )?Apex (is|are) not installed", r"megatron\."),
    (r"The \.grad attribute of a Tensor that is not a leaf Tensor", r"megatron\.core\.optimizer\."),
    (r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)`", r"torch\.distributed\."),
    (r"`load_state_dict` is deprecated", r"megatron\.core\.dist_checkpointing\."),
    (r"Please use DTensor instead", r"torch\.distributed\.checkpoint\."),
):
    warnings.filterwarnings("ignore", message=_message, module=_module)
