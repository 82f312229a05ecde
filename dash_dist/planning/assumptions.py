"""Assumptions of a prediction that the configuration does not state: the routing of the model, the speed of kernels.

Knows the numbers and where they come from; does not know what is computed with them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Assumptions:
    """Assumptions that the configuration does not state.

    Attributes:
        density: selected / causally available chunks, of all layers.
        independence: independence of neighbouring tokens' selections: 0 as correlated as on the benchmarks' inputs
            (docs/results), 1 independent. Young models lie between (docs/planning.md).
        coverage: share of the chunks of other ranks that the queries of a context-parallel rank select between them;
            None: from density and independence.
        document_length: tokens of the document that a token is in, on average over tokens; None: the whole sequence.
        matmul_efficiency: share of the GPU's bf16 peak that matrix products reach: 740 TFLOP/s in step_1xh200.json.
        fp8_efficiency: share of twice that peak that products in FP8 reach: 1,480 TFLOP/s in step_1xh200_fp8.json.
        memory_efficiency: share of the memory bandwidth that element-wise kernels reach: likewise, within 3 %.
        host_seconds: that the host takes to launch one layer's forward pass; the backward pass takes twice as long.
        dense_factor: times the computation that is not attention, see `dash_dist.planning.calibration`.
        attention_factor: times the attention, likewise.
        memory_offset: bytes that the allocator holds in addition to the counted ones.
        context_gib: of the GPU's memory outside of the allocator: CUDA's context and loaded kernels.
        nccl_gib: likewise, NCCL's buffers, where there are several ranks.
        fragmentation: share of activations and work space that the allocator reserves in vain.
    """

    density: float = 0.1
    independence: float = 0.5
    coverage: float | None = None
    document_length: float | None = None
    matmul_efficiency: float = 0.75
    fp8_efficiency: float = 0.75
    memory_efficiency: float = 0.75
    host_seconds: float = 1e-3
    dense_factor: float = 1.0
    attention_factor: float = 1.0
    memory_offset: float = 0.0
    context_gib: float = 1.0
    nccl_gib: float = 1.0
    fragmentation: float = 0.05
