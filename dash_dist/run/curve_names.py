"""Names of a run's curves, and their pages in TensorBoard's custom scalars.

Knows which curves exist and which share a chart; does not know their values.
"""

from collections.abc import Sequence

from dash_dist.run.events import EVENT_KINDS

PARTS = ("data", "forward", "backward", "exchange", "gradients", "optimizer", "heat_map", "save", "rest")
"""Parts of the time of a step, in the order of the pages; see docs/dashboards.md."""

_COMPUTING = ("forward", "backward")
# Parts that only a few steps have are left out: TensorBoard would connect them by a line.
_NOT_COMPUTING = tuple(part for part in PARTS if part not in (*_COMPUTING, "heat_map"))

HEALTH = "Health"
FINAL_METRICS = (
    "train/loss",
    "train/tokens",
    "perf/tokens_per_second_per_gpu",
    "perf/model_tflops_per_gpu",
    "routing/mean_density",
)
"""Curves whose last values appear next to a run's hyperparameters."""

Chart = list[str | list[str]]  # as SummaryWriter.add_custom_scalars takes it: a kind and regular expressions of tags


def pages(
    *,
    with_mfu: bool,
    context_parallel: bool,
    with_heldout: bool = False,
    with_routing_warmup: bool = False,
    with_conversion: bool = False,
) -> dict[str, dict[str, Chart]]:
    """Return page -> chart -> its curves.

    Args:
        with_mfu: the peak of the GPU is known.
        context_parallel: the run has more than one context-parallel rank.
        with_heldout: the run computes its loss on held-out sequences.
        with_routing_warmup: the routing scale changes in the run.
        with_conversion: the run is a conversion phase.
    """
    cp_health = {"Overlap of exchange and attention": ["cp/overlap"], "Imbalance over CP ranks": ["cp/imbalance/.*"]}
    health = {
        "Loss (nats per token)": ["train/loss"],
        **({"Held-out loss (nats per token)": ["heldout/loss"]} if with_heldout else {}),
        "Gradient norm": ["train/grad_norm"],
        "Tokens/s per GPU": ["perf/tokens_per_second_per_gpu"],
        **({"MFU": ["perf/mfu"]} if with_mfu else {"Model TFLOP/s per GPU": ["perf/model_tflops_per_gpu"]}),
        "Computing (s per step, mean of ranks)": [f"time/{part}" for part in _COMPUTING],
        "Not computing (s per step, mean of ranks)": [f"time/{part}" for part in _NOT_COMPUTING],
        "Faults and recoveries (count)": [f"fault/{kind}" for kind in EVENT_KINDS],
        "Memory (GiB, fullest rank)": ["memory/.*"],
        "Density (selected / available chunks)": ["routing/mean_density"],
        **(cp_health if context_parallel else {}),
    }
    speed = {
        "Step (s)": ["perf/step_seconds"],
        "Model TFLOP/s per GPU": ["perf/model_tflops_per_gpu"],
        "Computing (s per step, slowest rank)": [f"time_max/{part}" for part in _COMPUTING],
        "Not computing (s per step, slowest rank)": [f"time_max/{part}" for part in _NOT_COMPUTING],
    }
    routing = {
        **({"Routing scale": ["routing/scale"]} if with_routing_warmup else {}),
        **({"Distance from the dense outputs": ["routing/conversion_loss"]} if with_conversion else {}),
        "Density by layer": ["routing/density/.*"],
        "Heat maps (s of a step that draws them, mean of ranks)": ["time/heat_map"],
    }
    exchange = {
        "Bytes of a step (GiB)": [f"cp/{name}_gib" for name in ("planned", "sent", "slow_link", "dense")],
        "Union coverage by layer": ["cp/coverage/.*"],
        "Exchanges (share of forward passes)": ["cp/exchange/.*"],
    }
    data = {
        "Tokens seen": ["train/tokens"],
        "Learning rate": ["train/learning_rate"],
        "Padding (share)": ["data/padding"],
        "Skipped documents": ["data/skipped_documents"],
        "Tokens by source": ["data/tokens/.*", "data/loss_tokens/.*"],
        "Epochs by source": ["data/epochs/.*"],
    }
    heldout = {
        "Held-out loss by position (nats per token)": ["heldout/loss/.*"],
        "Evaluation (s)": ["heldout/seconds"],
    }
    chosen = {
        HEALTH: health,
        **({"Held-out loss": heldout} if with_heldout else {}),
        "Speed": speed,
        "Routing": routing,
        **({"Context parallelism": exchange} if context_parallel else {}),
        "Data and schedule": data,
    }
    return {page: {title: _lines(tags) for title, tags in charts.items()} for page, charts in chosen.items()}


def _lines(tags: Sequence[str]) -> Chart:
    return ["Multiline", [f"{tag}$" for tag in tags]]
