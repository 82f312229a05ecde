"""A layout, and what of a model one rank has under it.

Knows sizes; does not know bytes nor seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dash_dist.config.attention import AttentionConfig
from dash_dist.config.model import padded_vocab_size
from dash_dist.config.run import RunConfig
from dash_dist.models.nsa import nsa_layers
from dash_dist.planning.recompute import Recompute
from dash_kernels.limits import tile_tokens


@dataclass(frozen=True)
class Layout:
    """Parallel sizes of a run, and its trades of time for memory."""

    tensor: int
    context: int
    pipeline: int
    data: int
    exchange: str
    recompute: Recompute
    mlp_tile_tokens: int | None = None
    offload_activations: float = 0.0
    sequence_parallel: bool = True
    """Where tensor is above 1."""
    fp8_linears: bool = False

    @property
    def gpus(self) -> int:
        return self.tensor * self.context * self.pipeline * self.data

    @property
    def weight_replicas(self) -> int:
        """Ranks that hold the same weights: gradients are summed, and the optimizer's state is sharded, over them."""
        return self.context * self.data

    @property
    def sequence_shards(self) -> int:
        """Tensor-parallel ranks that the residual stream is split over along the sequence."""
        return self.tensor if self.sequence_parallel else 1

    def __str__(self) -> str:
        exchange = f", {self.exchange}" if self.context > 1 else ""
        tiled = "" if self.mlp_tile_tokens is None else f", MLP tiles of {self.mlp_tile_tokens} tokens"
        offloaded = f", offload {self.offload_activations:g}" if self.offload_activations else ""
        fp8 = ", FP8 linears" if self.fp8_linears else ""
        whole = ", whole sequences in TP" if self.tensor > self.sequence_shards else ""
        return (
            f"TP {self.tensor} x CP {self.context} x PP {self.pipeline} x DP {self.data}{exchange}, "
            f"recompute {self.recompute}{tiled}{offloaded}{whole}{fp8}"
        )

    @staticmethod
    def of(config: RunConfig, gpus: int) -> Layout:
        """The layout that the configuration asks for on so many GPUs. Raises ValueError where it cannot run there."""
        config.check_world_size(gpus)
        parallel = config.parallel
        return Layout(
            tensor=parallel.tensor,
            context=parallel.context,
            pipeline=parallel.pipeline,
            data=parallel.data_parallel_size(gpus),
            exchange=config.attention.exchange,
            recompute=Recompute.of(parallel),
            mlp_tile_tokens=parallel.mlp_tile_tokens,
            offload_activations=parallel.offload_activations,
            sequence_parallel=parallel.sequence_parallel is not False,
            fp8_linears=parallel.fp8_linears,
        )


@dataclass(frozen=True)
class Sizes:
    """Share of one rank in a run: numbers of channels, heads, tokens and chunks.

    Attributes:
        batch: sequences of a micro-batch.
        shard: tokens of a sequence that the rank holds, T / cp.
        chunks: of the whole sequence, n.
        hidden, q, kv, ffn, vocab: channels of the residual stream, of the rank's queries, of its keys (as many of its
            values), of its half of SwiGLU, and rows of its part of the padded vocabulary.
        query_heads, kv_heads, head_dim, chunk_size: of the rank's attention.
        layers: of one pipeline stage.
        micro_batches: of one step.
        document: tokens of the document of a token.
        listed: entries of a token's list of chunks in the layers that have lists, at most.
        nsa_layers: of the whole model.
        attend_first_chunk: dash layers attend to the first chunk of a document in a pass of its own.
        tied: one matrix is the embedding and the output layer.
        sequence_shards: ranks that the residual stream of those tokens is split over.
        norms_after: norms read what attention and MLP return, before it is added to the residual stream.
    """

    batch: int
    shard: int
    chunks: int
    hidden: int
    q: int
    kv: int
    ffn: int
    vocab: int
    query_heads: int
    kv_heads: int
    head_dim: int
    chunk_size: int
    layers: int
    micro_batches: int
    document: float
    listed: int
    nsa_layers: frozenset[int]
    attend_first_chunk: bool
    tied: bool
    sequence_shards: int
    norms_after: bool

    @staticmethod
    def of(config: RunConfig, layout: Layout, *, vocab_size: int, document_length: float | None = None) -> Sizes:
        """
        Args:
            vocab_size: tokens of the tokenizer.
            document_length: tokens; None: that of a sequence.
        """
        model, training = config.model, config.training
        head_dim = model.resolved_head_dim
        return Sizes(
            batch=training.micro_batch_size,
            shard=training.sequence_length // layout.context,
            chunks=math.ceil(training.sequence_length / config.attention.chunk_size),
            hidden=model.hidden_size,
            q=model.num_attention_heads * head_dim // layout.tensor,
            kv=model.num_kv_heads * head_dim // layout.tensor,
            ffn=model.ffn_hidden_size // layout.tensor,
            vocab=padded_vocab_size(vocab_size) // layout.tensor,
            query_heads=model.num_attention_heads // layout.tensor,
            kv_heads=model.num_kv_heads // layout.tensor,
            head_dim=head_dim,
            chunk_size=config.attention.chunk_size,
            layers=model.num_layers // layout.pipeline,
            micro_batches=training.global_batch_size // (training.micro_batch_size * layout.data),
            document=min(document_length or training.sequence_length, training.sequence_length),
            listed=_listed(config.attention),
            nsa_layers=frozenset(nsa_layers(model, config.attention)),
            attend_first_chunk=config.attention.attend_first_chunk,
            tied=model.tie_embeddings,
            sequence_shards=layout.sequence_shards,
            norms_after=model.norms_after,
        )

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on this rank."""
        return self.batch * self.shard

    @property
    def stream_tokens(self) -> int:
        """Tokens whose residual stream, norms and inputs of projections this rank holds."""
        return self.tokens // self.sequence_shards

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.query_heads // self.kv_heads

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile of the attention kernels."""
        return tile_tokens(self.group, self.chunk_size)

    @property
    def chunks_per_token(self) -> float:
        """Causally available chunks of a token, the own one counted, on average."""
        return (max(self.document, self.chunk_size) / self.chunk_size + 1) / 2


def _listed(attention: AttentionConfig) -> int:
    """Earlier chunks in the longest list: those of a document that is short enough to be dense, where there is one."""
    if attention.top_chunks is None:
        return 0
    dense = attention.infllmv2_rule.dense_length // attention.chunk_size if "infllmv2" in attention.pattern else 0
    return max(attention.top_chunks, dense) - 1
