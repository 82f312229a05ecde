"""A training step of transformers' Llama with Liger's kernels, cuDNN's attention and gradient checkpointing.

    python -m tools.benchmarks.step.peer SHAPE TOKENS

Prints one line of JSON: median seconds of a step, and the allocator's peak. Run by `tools.benchmarks.step`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tools.benchmarks.common.shapes import SHAPES, Shape
from tools.benchmarks.step.cases import VOCABULARY

WARMUP_STEPS, STEPS = 2, 3


def build(shape: Shape, tokens: int) -> Any:
    """The model in bfloat16 on the GPU, in training mode."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers import AutoModelForCausalLM, LlamaConfig

    apply_liger_kernel_to_llama()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=tokens,
        tie_word_embeddings=True,
        use_cache=False,
    )
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def step_seconds(shape: Shape, tokens: int) -> dict[str, float]:
    """Seconds of forward, backward and AdamW on one sequence of random tokens."""
    torch.manual_seed(0)
    model = build(shape, tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    seconds = []
    for _ in range(WARMUP_STEPS + STEPS):
        batch = torch.randint(VOCABULARY, (1, tokens), device="cuda")
        torch.cuda.synchronize()
        begin = time.perf_counter()
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return {
        "step_seconds": statistics.median(seconds[WARMUP_STEPS:]),
        "allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def main() -> None:
    shape, tokens = sys.argv[1:]
    print(json.dumps(step_seconds(SHAPES[shape], int(tokens))))


if __name__ == "__main__":
    main()
