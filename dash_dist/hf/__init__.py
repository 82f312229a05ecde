"""DashAttention in transformers: models that `dash-dist export` wrote, loaded and generated from.

Importing this package registers `dash_attention`, so that
`AutoModelForCausalLM.from_pretrained(folder, attn_implementation="dash_attention")` works. docs/hf.md is the
guide. Knows transformers and the attention on one device; does not know Megatron-core, nor how a model was trained.
"""

from dash_dist.extras import require_extra

require_extra("hub", "dash_dist.hf")

from dash_dist.hf.cache import DashCacheLayer  # noqa: E402
from dash_dist.hf.registration import NAME, load, register  # noqa: E402

__all__ = ["NAME", "DashCacheLayer", "load", "register"]

register()
