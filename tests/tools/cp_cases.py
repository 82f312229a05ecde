"""What the tests of the context-parallel benchmark run."""

from tools.benchmarks.common.inputs import Case

CASE = Case(
    seq_len=256,
    query_heads=4,
    kv_heads=2,
    head_dim=16,
    chunk_size=16,
    dtype="fp32",
    inputs="smooth",
    asked_density=0.5,
    prior_sigma=None,
)
