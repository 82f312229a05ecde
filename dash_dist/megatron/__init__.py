"""The model, its parallelism, its optimizer and its checkpoint format, on top of Megatron-core.

Knows Megatron-core. Does not know where batches come from, nor the files of a run.
"""

import functools
import logging
import warnings

# Warnings of Megatron-core that say nothing to the users of this package: Apex and Transformer Engine are
# never used, the optimizer looks at the gradient of its (non-leaf) shards on purpose, it calls parts of
# torch that have newer names, and it imports models that are not used here.
for _message, _module in (
    (r"(Transformer Engine and )?Apex (is|are) not installed", r"megatron\."),
    (r"The \.grad attribute of a Tensor that is not a leaf Tensor", r"megatron\.core\.optimizer\."),
    (r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)`", r"torch\.distributed\."),
    (r"`load_state_dict` is deprecated", r"megatron\.core\.dist_checkpointing\."),
    (r"Please use DTensor instead", r"torch\.distributed\.checkpoint\."),
    (r"The argument order of load has been changed", r"torch\.distributed\.checkpoint\."),
    (r"torch\.distributed is disabled, unavailable or uninitialized", r"torch\.distributed\.checkpoint\."),
    (r"MimoModelConfig is experimental", r"megatron\."),
):
    warnings.filterwarnings("ignore", message=_message, module=_module)


def _says_something(known: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(known)


# What newer releases log about their own plans, at every start: the layers are GPTModel's, the layout of buffers is the
# default one, and the state that is not a tensor lies in a file of its own.
for _logger, _known in (
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    ("megatron.core.distributed.distributed_data_parallel", "DistributedDataParallel: full_param_layout not provided"),
    ("megatron.core.dist_checkpointing.strategies.common", "load_common is deprecated"),
):
    logging.getLogger(_logger).addFilter(functools.partial(_says_something, _known))
