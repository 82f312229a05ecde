"""A job of one rank that builds the models of recipes on the meta device.

The test process itself does not import this: it would load Megatron-core.
"""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dash_dist.config.file import load_config
from dash_dist.config.parallel import ParallelConfig
from dash_dist.megatron.model import build_model, transformer_config
from dash_dist.megatron.parallel import ParallelDims
from dash_dist.models.hugging_face import config_of


class Zeros:
    """Weights that are all zero."""

    def parameter(self, name: str) -> None:
        return None


def parameters_on_meta(paths: list[Path]) -> dict[str, tuple[int, int]]:
    """Return the parameters of each recipe's model as it is trained, without summary queries and padding, and as
    transformers builds it from the exported configuration."""
    dims = ParallelDims.initialise(ParallelConfig(), timeout=timedelta(seconds=60))
    dims = replace(dims, device=torch.device("meta"))
    found = {}
    for path in paths:
        stage = load_config(path).stage_list[-1].config
        model, vocab_size = stage.model, stage.model.vocab_size
        assert vocab_size is not None
        with torch.device("meta"):
            config = transformer_config(model, ParallelConfig(), dtype=torch.bfloat16, device=torch.device("cpu"))
            built = build_model(
                config,
                model,
                stage.attention,
                dims,
                vocab_size=vocab_size,
                sequence_length=stage.training.sequence_length,
                seed=0,
                source=Zeros(),
            )
            exported = config_of(
                model,
                {"kind": "dense"},
                vocab_size=vocab_size,
                sequence_length=stage.training.sequence_length,
                dtype="bfloat16",
            )
            theirs = AutoModelForCausalLM.from_config(CONFIG_MAPPING[exported["model_type"]].from_dict(exported))
        ours = sum(
            parameter.numel() for name, parameter in built.named_parameters() if not name.endswith("summary_query")
        )
        found[path.stem] = (ours, sum(parameter.numel() for parameter in theirs.parameters()))
    return found
