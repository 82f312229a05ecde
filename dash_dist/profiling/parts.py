"""The parts of a step, and the rules that find the part of an activity.

Knows the ranges of the model and of the attention, and names of kernels. Does not know times.

The first rule that applies decides. Ranges come from `dash_kernels.ranges`; names of kernels decide where a library's
kernel is unmistakable, or where a trace has no ranges.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dash_dist.profiling.trace import Activity
from dash_kernels.ranges import PREFIX

OTHER = "other"
PARTS = {
    "summarize": "attention: summaries",
    "route": "attention: routing",
    "lists": "attention: lists",
    "attend": "attention: selected chunks",
    "row_dots": "attention: row dots",
    "query_gradient": "attention: query gradient",
    "key_gradient": "attention: key gradient",
    "dense": "attention: dense",
    "attention_rest": "attention: rest",
    "matmul": "matrix products",
    "fp8_casts": "casts to FP8",
    "norm": "norms",
    "mlp": "MLP: activation",
    "around_attention": "rotary, copies of q, k, v",
    "pointwise": "residuals, casts, copies",
    "accumulation": "gradient accumulation",
    "embedding": "embedding",
    "output_matmul": "output layer: products",
    "loss": "loss",
    "exchange": "exchange of K and V",
    "packing": "exchange: packing",
    "gradients": "gradient reduction",
    "collectives": "other collectives",
    "host_copies": "copies to and from the host",
    "optimizer": "optimizer",
    OTHER: "other",
    "data_gaps": "gaps: reading data",
    "optimizer_gaps": "gaps: in the optimizer",
}
"""Parts in the order of the table, with their titles. In a gap the device has nothing to do."""

GAPS = ("data_gaps", "optimizer_gaps")
"""Parts in which the device waits for a range of the host."""


@dataclass(frozen=True)
class Rule:
    """A condition on an activity; all that is given must hold.

    Attributes:
        name: pattern in the activity's name, upper and lower case alike.
        range: innermost range around the activity.
        within: pattern in the name of any call around the activity.
        collective: for collectives alone.
    """

    part: str
    name: str | None = None
    range: str | None = None
    within: str | None = None
    collective: bool = False

    def applies(self, activity: Activity) -> bool:
        return (
            (not self.collective or activity.is_collective)
            and (self.name is None or re.search(self.name, activity.name, re.IGNORECASE) is not None)
            and (self.range is None or _innermost(activity) == self.range)
            and (self.within is None or any(re.search(self.within, call) for call in activity.context))
        )


_STAGES = ("summarize", "route", "attend", "row_dots", "query_gradient", "key_gradient")
_OF_ATTENTION = (
    f"^{PREFIX}(exchange|core attention|{'|'.join(_STAGES)}|reached|finish_query_gradient)$|ParallelAttention"
)
_PRODUCT = r"gemm|gemv|nvjet|xmma|cublas|splitk|cutlass|^aten::(_scaled_mm|mm|bmm|addmm|baddbmm)$"

RULES = (
    Rule("data_gaps", name=f"^{PREFIX}data$"),
    Rule("optimizer_gaps", name=f"^{PREFIX}optimizer$"),
    Rule("exchange", within=_OF_ATTENTION, collective=True),
    Rule("gradients", within=f"^{PREFIX}gradients$", collective=True),
    Rule("collectives", collective=True),
    Rule("collectives", name="^c10d::"),
    Rule("host_copies", name="^Memcpy (HtoD|DtoH)"),
    Rule("summarize", name="^summary_kernel"),
    Rule("lists", name="^(query_bits|reached)_kernel"),
    Rule("route", name="^route_kernel"),
    Rule("attend", name="^attend_(pairs_)?kernel"),
    Rule("row_dots", name="^row_dots_kernel"),
    Rule("query_gradient", name="^query_gradient_"),
    Rule("key_gradient", name="^key_gradient_"),
    *(Rule(stage, range=stage) for stage in _STAGES),
    Rule("lists", range="reached"),
    Rule("lists", range="mark_one"),
    Rule("attention_rest", range="first chunks"),
    Rule("query_gradient", range="finish_query_gradient"),
    Rule("dense", name="flash|fmha|sdpa|scaled_dot_product|flex_attention"),
    Rule("packing", range="exchange"),
    Rule("attention_rest", range="core attention"),
    Rule("optimizer", within=rf"^{PREFIX}optimizer$|^Optimizer\."),
    Rule("gradients", range="gradients"),
    Rule("output_matmul", name=_PRODUCT, range="loss"),
    Rule("loss", range="loss"),
    Rule("fp8_casts", name="^cast_rows_kernel"),
    Rule("fp8_casts", range="fp8 cast"),
    Rule("matmul", name=_PRODUCT),
    Rule("loss", name="cross_entropy|nll_loss|log_softmax"),
    Rule("norm", range="norm"),
    Rule("norm", name="(layer|rms)_?norm"),
    Rule("mlp", range="mlp"),
    Rule("mlp", name="swiglu|silu"),
    Rule("around_attention", range="attention"),
    Rule("around_attention", name="rope|rotary|^turn_kernel"),
    Rule("embedding", range="embedding"),
    Rule("accumulation", within="AccumulateGrad"),
    Rule(
        "pointwise",
        name="elementwise|vectorized|unrolled|reduce|CatArray|copy|fill|index|scatter|multi_tensor|^triton_(poi|red|per)_|^Mem(set|cpy)|^aten::",
    ),
)

_RANGES_OF_MODULES = {
    "Norm": "norm",
    "MLP": "mlp",
    "SelfAttention": "attention",
    "CoreAttention": "core attention",
    "LanguageModelEmbedding": "embedding",
}
"""End of the name of a module's class -> the range that its forward pass is."""


def part_of(activity: Activity) -> str:
    """Return the part of a step that an activity belongs to, a key of `PARTS`."""
    return _part_of(activity.name, activity.context)


@functools.lru_cache(maxsize=1 << 16)  # a trace repeats itself from layer to layer
def _part_of(name: str, context: tuple[str, ...]) -> str:
    activity = Activity(name, (), context)
    return next((rule.part for rule in RULES if rule.applies(activity)), OTHER)


def modules_with_ranges(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str]]:
    """Yield the modules of a model whose forward pass is a range, with its name."""
    for module in model.modules():
        name = type(module).__name__
        found = next((of for end, of in _RANGES_OF_MODULES.items() if name.endswith(end)), None)
        if found is not None:
            yield module, found


def _innermost(activity: Activity) -> str | None:
    """Return the innermost range around an activity, without that of the steps."""
    ranges = (call.removeprefix(PREFIX) for call in activity.context if call.startswith(PREFIX))
    return next(ranges, None)
