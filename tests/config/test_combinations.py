"""What a run's YAML may say, and what a step is worth."""

from typing import Any

import pytest
from pydantic import ValidationError

from dash_dist.config.attention import AttentionConfig
from dash_dist.config.combination import check_combination
from dash_dist.config.model import ModelConfig, padded_vocab_size
from dash_dist.config.optimizer import OptimizerConfig
from dash_dist.config.parallel import ParallelConfig
from dash_dist.engine.flops import flops_per_token
from dash_kernels.limits import MAX_TRITON_HEAD_DIM

SHAPE: dict[str, Any] = {
    "num_layers": 6,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 8,
    "num_kv_heads": 4,
}


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (ModelConfig, SHAPE | {"num_kv_heads": 3}, r"multiple of num_kv_heads 3: set num_kv_heads to one of \[1, 2,"),
        (ModelConfig, SHAPE | {"hidden_size": 60}, "hidden_size 60 is not a multiple of num_attention_heads 8"),
        (ModelConfig, SHAPE | {"head_dim": 9}, "head_dim 9 is odd, .* set head_dim to 10"),
        (ModelConfig, SHAPE | {"width": 1}, "width"),
        (AttentionConfig, {"alpha": 1.0}, "alpha"),
        (AttentionConfig, {"layout": "striped"}, "zigzag"),
        (ParallelConfig, {"context": 0}, "context"),
        (OptimizerConfig, {"lr": 1e-3, "min_lr": 1e-2}, "min_lr 0.01 is above lr 0.001"),
    ],
)
def test_impossible_values_are_refused(config: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**values)


@pytest.mark.parametrize(
    ("parallel", "attention", "world_size", "sequence_length", "message"),
    [
        ({"tensor": 2, "context": 2}, {}, 6, 1024, "world size 6 .* = 2 x 1 x 2 = 4: start 8 processes"),
        ({"tensor": 8}, {}, 8, 1024, r"num_kv_heads 4 .* set parallel.tensor to one of \[1, 2, 4\]"),
        (
            {"pipeline": 2, "recompute": "full", "recompute_layers": 4},
            {},
            2,
            1024,
            "recompute_layers 4 is more than the 3 layers of a pipeline stage: set it to 3 or less, or to null",
        ),
        (
            {"tensor": 4, "fp8_linears": True},
            {},
            4,
            1024,
            r"ffn_hidden_size / parallel.tensor 4 = 24 is not a multiple of 16, .* set parallel.fp8_linears to false",
        ),
        ({"pipeline": 4}, {}, 4, 1024, r"num_layers 6 .* set parallel.pipeline to one of \[1, 2, 3, 6\]"),
        ({"context": 8}, {}, 8, 100_000, "100000 is not a multiple of 2 x cp x chunk_size = 1024: pad to 100352"),
        (
            {"context": 2},
            {"layout": "contiguous", "chunk_size": 32},
            2,
            100,
            "100 is not a multiple of cp x chunk_size = 64: pad to 128",
        ),
        ({"overlap_gradients": True}, {"conversion": "output"}, 1, 1024, "set parallel.overlap_gradients to false"),
        (
            {"recompute": "full", "offload_activations": 1.0},
            {"conversion": "output"},
            1,
            1024,
            "set parallel.offload_activations to 0",
        ),
        ({}, {"backend": "triton", "alpha": 2.0}, 1, 1024, "triton computes attention.alpha 1.5 only, not 2.0"),
    ],
)
def test_impossible_combinations_are_refused(
    parallel: dict[str, Any], attention: dict[str, Any], world_size: int, sequence_length: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_combination(
            ModelConfig(**SHAPE),
            AttentionConfig(**attention),
            ParallelConfig(**parallel),
            world_size=world_size,
            sequence_length=sequence_length,
        )


def test_triton_is_refused_above_the_head_dim_of_its_kernels() -> None:
    def check(head_dim: int, backend: str) -> None:
        check_combination(
            ModelConfig(**SHAPE, head_dim=head_dim),
            AttentionConfig(backend=backend),
            ParallelConfig(),
            world_size=1,
            sequence_length=1024,
        )

    check(MAX_TRITON_HEAD_DIM, "triton")
    check(MAX_TRITON_HEAD_DIM + 2, "auto")
    with pytest.raises(ValueError, match="takes a head_dim of up to 256, not 258"):
        check(MAX_TRITON_HEAD_DIM + 2, "triton")


def test_one_shard_may_have_any_length() -> None:
    for parallel in (ParallelConfig(), ParallelConfig(tensor=2, sequence_parallel=False)):
        check_combination(ModelConfig(**SHAPE), AttentionConfig(), parallel, world_size=4, sequence_length=1001)


@pytest.mark.parametrize("asked", [None, True])
def test_shards_over_tensor_parallelism_are_equal(asked: bool | None) -> None:
    parallel = ParallelConfig(tensor=2, sequence_parallel=asked)
    shape = ModelConfig(**SHAPE)
    check_combination(shape, AttentionConfig(), parallel, world_size=2, sequence_length=1002)
    message = (
        r"1001 is not a multiple of cp x tp = 1 x 2 = 2, over which parallel.sequence_parallel splits it: pad to 1002, "
        "or set parallel.sequence_parallel to false"
    )
    with pytest.raises(ValueError, match=message):
        check_combination(shape, AttentionConfig(), parallel, world_size=2, sequence_length=1001)


def test_sequence_parallelism_needs_tensor_parallelism() -> None:
    assert [ParallelConfig(tensor=tensor).sequence_shards for tensor in (1, 2)] == [1, 2]
    assert ParallelConfig(tensor=2, sequence_parallel=False).sequence_shards == 1
    with pytest.raises(ValidationError, match=r"sequence_parallel is true and tensor is 1.* 2 or more, or .* to null"):
        ParallelConfig(sequence_parallel=True)


def test_vocabulary_rows_do_not_depend_on_the_layout() -> None:
    assert [padded_vocab_size(size) for size in (1, 64, 65, 257)] == [64, 64, 128, 320]


def test_flops_count_weights_and_attention() -> None:
    model = ModelConfig(**SHAPE)
    weights = 6 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96) + 64 * 257
    attention = AttentionConfig(chunk_size=64)

    def flops(length: int, density: float) -> float:
        return flops_per_token(model, attention, vocab_size=257, document_length=length, density=density)

    # One chunk: half of it is attended on average, and half a summary is looked at.
    assert flops(64, 1.0) == 6 * weights + 6 * (12 * 64 * 32 + 6 * 64 * 0.5)
    # At full density the attended tokens are half of the sequence.
    assert flops(4096, 1.0) == 6 * weights + 6 * (12 * 64 * 2048 + 6 * 64 * 32)
    assert flops(4096, 0.25) < flops(4096, 0.5) < flops(4096, 1.0)


def test_flops_count_each_layer_by_its_kind() -> None:
    model = ModelConfig(**SHAPE)

    def attended(length: int, **settings: object) -> float:
        """Operations of the attention, in units of 12 H for each layer."""
        attention = AttentionConfig.model_validate(settings)
        none = AttentionConfig(kind="window", window=1)
        all_and_one = [
            flops_per_token(model, one, vocab_size=257, document_length=length, density=0.25)
            for one in (attention, none)
        ]
        return (all_and_one[0] - all_and_one[1]) / (12 * 64) + 6 * (1 - 1 / (2 * length))

    assert attended(4096, kind="dense") == 6 * 2048
    assert attended(4096, kind="window", window=512) == 6 * (512 - 512**2 / 8192)
    assert attended(256, kind="window", window=512) == 6 * 128
    # 64 chunks, of which the first 4 tokens' chunks have 1 to 4; the own one is half attended.
    earlier = (1 + 2 + 3 + 61 * 4) / 64 - 1
    routing = 2 * 4096 / (2 * 64) / 2
    assert attended(4096, kind="topk", top_chunks=4) == pytest.approx(12 * (64 * earlier + 32) / 2 + routing)
    infllmv2 = {"kind": "infllmv2", "top_chunks": 4, "infllmv2": {"local_chunks": 1, "dense_length": 2048}}
    routing = 2 * 4096 / (2 * 16) / 2
    assert attended(4096, **infllmv2) == pytest.approx(12 * (64 * earlier + 32) / 2 + routing)
    assert attended(2048, **infllmv2) == pytest.approx(attended(2048, kind="dense"))
    # Projections to two more keys and values of 4 heads of 8 and to 3 x 8 gates; two perceptrons every 16 tokens.
    weights = 64 * (4 * 32 + 3 * 8) + 2 * 4 * (32 * 8 + 8) * 8 / 16
    branches = 12 * (64 * earlier + 32 + 512 - 512**2 / 8192 + 4096 / 32) / 2
    of_nsa = attended(4096, kind="nsa", top_chunks=4)
    assert of_nsa == pytest.approx(branches + 6 * weights / 64 / 2)
    mixed = attended(4096, kind=["window", "dense", "dash"], window=512)
    assert mixed == pytest.approx(sum(attended(4096, **one) for one in KINDS) / 3)


KINDS: list[dict[str, object]] = [{"kind": "window", "window": 512}, {"kind": "dense"}, {"kind": "dash"}]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "window"}, "attention.window is not set: give it in tokens"),
        ({"kind": ["dash", "dense"], "window": 5}, "attention.window is 5, and attention.kind has no window layer"),
        ({"kind": []}, "at least 1 item"),
        ({"kind": ["dash", "sparse"]}, "'dash', 'dense', 'window', 'topk', 'infllmv2' or 'nsa'"),
        ({"kind": ["dash", "topk"]}, "attention.kind has topk layers, and attention.top_chunks is not set"),
        (
            {"kind": "dash", "top_chunks": 4},
            "attention.top_chunks is 4, and attention.kind has no layer of kind topk or",
        ),
        ({"kind": "infllmv2", "top_chunks": 33}, "always selects 34 chunks: raise top_chunks to 35, or lower"),
        ({"kind": "topk", "top_chunks": 4, "infllmv2": {}}, "attention.kind has no infllmv2 layer"),
        (
            {"kind": "infllmv2", "top_chunks": 64, "infllmv2": {"dense_length": 100}},
            "dense_length 100 is not a multiple of attention.chunk_size 64: set it to 128",
        ),
        ({"kind": "nsa"}, "attention.kind has nsa layers, and attention.top_chunks is not set"),
        ({"kind": "nsa", "top_chunks": 2}, "attention.nsa always selects 3 chunks: raise top_chunks to 4, or lower"),
        ({"kind": "topk", "top_chunks": 4, "nsa": {}}, "attention.kind has no nsa layer"),
        ({"kind": "nsa", "top_chunks": 4, "nsa": {"window": 0}}, "greater than 0"),
        ({"kind": "topk", "top_chunks": 1}, "greater than or equal to 2"),
        ({"kind": "topk", "top_chunks": 4, "conversion": "output"}, "attention.kind topk has no routing"),
        ({"kind": "dense", "attend_first_chunk": True}, "attend_first_chunk is given, and attention.kind dense has no"),
    ],
)
def test_kinds_that_contradict_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionConfig.model_validate(settings)


def test_a_list_of_kinds_repeats_over_the_layers() -> None:
    attention = AttentionConfig(kind=("window", "window", "dash"), window=8)
    assert attention.kinds(6) == ("window", "window", "dash", "window", "window", "dash")
    assert AttentionConfig(kind=("dash", "dense", "dash", "dense")).pattern == ("dash", "dense")
    with pytest.raises(ValueError, match=r"has 3 entries, and model.num_layers is 4: .* that divides it: 1, 2, 4"):
        attention.kinds(4)
    with pytest.raises(ValueError, match="has 8 entries"):
        AttentionConfig(kind=("dash",) * 8).kinds(4)
    with pytest.raises(ValueError, match=r"attention.kind has 4 entries"):
        check_combination(
            ModelConfig(**SHAPE),
            AttentionConfig(kind=("dash", "dash", "dash", "dense")),
            ParallelConfig(),
            world_size=1,
            sequence_length=64,
        )
