"""Documents, their tokens, their order, and the position in the data.

Knows its data-parallel index, and how ranks share the work of tokenising; does not know models.
"""

import warnings

# The format of the tokens is Megatron-core's, which says this when it is imported.
warnings.filterwarnings(
    "ignore", message=r"(Transformer Engine and )?Apex (is|are) not installed", module=r"megatron\."
)
