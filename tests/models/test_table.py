"""The table of parameters: importing and exporting are inverse, bit by bit."""

import pytest
import torch

from dash_dist.config.model import FAMILIES, ModelConfig
from dash_dist.models.table import parameter_table


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_exact(family: str, tied: bool) -> None:
    parts = FAMILIES[family]
    model = ModelConfig(
        family=family,
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=6,
        num_kv_heads=2,
        head_dim=8,
        attention_bias=parts.attention_bias,
        qk_norm=parts.qk_norm,
        tie_embeddings=tied,
    )
    names: set[str] = set()
    for entry in parameter_table(model, 50).values():
        tensors = [torch.randn(shape) for shape in entry.tensors.values()]
        again = entry.split(entry.join(tensors))
        assert [tensor.tolist() for tensor in again] == [tensor.tolist() for tensor in tensors]
        assert not names & entry.tensors.keys()
        names |= entry.tensors.keys()
    assert ("lm_head.weight" in names) != tied
