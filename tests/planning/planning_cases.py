"""The small model that the planner's tests build, its layouts, and configurations to plan. Nothing of Megatron-core."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from dash_dist.config.model import ModelConfig
from dash_dist.config.parallel import RecomputeModule
from dash_dist.config.run import RunConfig
from dash_dist.config.trainable import LoraConfig, TrainablePattern, TrainableSection
from dash_dist.planning import GPUS, Assumptions, Layout, Machine
from dash_dist.planning.recompute import Recompute

VOCAB_SIZE = 100  # padded to 128
SEQUENCE_LENGTH = 256
CHUNK_SIZE = 16
GLOBAL_BATCH = 4
MODEL = ModelConfig(
    num_layers=2, hidden_size=40, ffn_hidden_size=56, num_attention_heads=4, num_kv_heads=2, head_dim=12
)


@dataclass(frozen=True)
class Case:
    """One layout of the small model; what is left of the ranks is data-parallel."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    tie_embeddings: bool = False
    distributed_optimizer: bool = True
    exchange: Literal["selective", "allgather", "ring"] = "selective"
    frozen: bool = False
    lora: bool = False
    nsa: bool = False

    @property
    def attention(self) -> dict[str, Any]:
        """Kinds of the layers."""
        return {"kind": ["dash", "nsa"], "top_chunks": 4} if self.nsa else {}

    @property
    def trainable(self) -> TrainableSection:
        if self.lora:
            return TrainableSection(lora=LoraConfig(rank=8))
        if not self.frozen:
            return TrainableSection()
        patterns = (TrainablePattern(match="decoder.layers.0.*"), TrainablePattern(match="*.mlp.linear_fc2.weight"))
        return TrainableSection(parameters=patterns)

    def config(self) -> RunConfig:
        return small_config(
            model={"tie_embeddings": self.tie_embeddings},
            parallel={
                "tensor": self.tensor,
                "pipeline": self.pipeline,
                "context": self.context,
                "distributed_optimizer": self.distributed_optimizer,
            },
            attention={"exchange": self.exchange, "chunk_size": CHUNK_SIZE, **self.attention},
            trainable=self.trainable.model_dump(),
        )


@dataclass
class Batch:
    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    cu_seqlens: torch.Tensor | None = None


def batch() -> Batch:
    """One sequence."""
    tokens = torch.arange(SEQUENCE_LENGTH)[None] % VOCAB_SIZE
    return Batch(tokens, tokens, torch.ones(1, SEQUENCE_LENGTH, dtype=torch.bool))


def small_config(**sections: dict[str, Any]) -> RunConfig:
    """The small model's run; `sections` replace settings."""
    settings: dict[str, dict[str, Any]] = {
        "run": {"name": "small"},
        "model": MODEL.model_dump(),
        "attention": {"chunk_size": CHUNK_SIZE},
        "data": {"source": "stdlib", "tokenizer": "bytes"},
        "optimizer": {"lr": 1e-3},
        "training": {"steps": 2, "sequence_length": SEQUENCE_LENGTH, "global_batch_size": GLOBAL_BATCH},
    }
    for name, section in sections.items():
        settings[name] = settings.get(name, {}) | section
    return RunConfig.model_validate(settings)


def large_config(**sections: dict[str, Any]) -> RunConfig:
    """A model of eight billion parameters on a million tokens."""
    return small_config(
        **{
            "model": {
                "num_layers": 32,
                "hidden_size": 4096,
                "ffn_hidden_size": 14336,
                "num_attention_heads": 32,
                "num_kv_heads": 8,
                "head_dim": 128,
            },
            "attention": {"chunk_size": 64},
            "training": {"steps": 2, "sequence_length": 2**20, "global_batch_size": 8},
        }
        | sections
    )


def machine(gpus: int, memory_gib: float = 79.2, gpu: str = "H100") -> Machine:
    return Machine(GPUS[gpu], gpus, min(gpus, 8), memory_gib * 2**30)


def layout(
    *,
    recompute: str = "none",
    modules: tuple[RecomputeModule, ...] | None = None,
    layers: int | None = None,
    **sizes: Any,
) -> Layout:
    plain = {"tensor": 1, "context": 1, "pipeline": 1, "data": 1, "exchange": "selective"}
    return Layout(**{**plain, **sizes}, recompute=Recompute(recompute, modules, layers))


DENSE = Assumptions(density=1.0)
