"""Kinds of attention that select a fixed number of chunks per token, their settings, and the density that follows.

Knows the kinds' arithmetic; does not know models, tensors or devices.
"""

from __future__ import annotations

from pydantic import Field

from dash_dist.config.section import Section

ROUTED_KINDS = ("dash", "topk", "infllmv2", "nsa")
"""Kinds whose layers select chunks by the query, and have statistics and heat maps of it."""

FIXED_KINDS = ("topk", "infllmv2", "nsa")
"""Those that select as many chunks for every token."""


class InfLLMv2Config(Section):
    """Chunks that layers of kind infllmv2 select in any case."""

    first_chunks: int = Field(default=1, ge=0, description="of a document that are always selected")
    local_chunks: int = Field(default=32, ge=0, description="before a token's own that are always selected")
    dense_length: int = Field(
        default=8192, ge=0, description="tokens; documents up to this length have dense attention"
    )

    @property
    def always(self) -> int:
        """Chunks that are selected in any case, the own one counted."""
        return self.first_chunks + self.local_chunks + 1


class NSAConfig(Section):
    """Chunks that layers of kind nsa select in any case, and their window."""

    first_chunks: int = Field(default=1, ge=0, description="of a document that are always selected")
    local_chunks: int = Field(default=1, ge=0, description="before a token's own that are always selected")
    window: int = Field(
        default=512, gt=0, description="tokens that a token of the window branch attends to, itself counted"
    )

    @property
    def always(self) -> int:
        """Chunks that are selected in any case, the own one counted."""
        return self.first_chunks + self.local_chunks + 1


def top_density(count: int, document_length: float, chunk_size: int) -> float:
    """Return selected / causally available chunks where a token selects `count`, its own counted, or all there are.

    Args:
        document_length: tokens.
    """
    chunks = max(document_length / chunk_size, 1.0)
    limit = min(count, chunks)
    # Chunk c of the document has c available: the first `limit` select all, the others `limit`.
    return (limit * (limit + 1) / 2 + (chunks - limit) * limit) / (chunks * (chunks + 1) / 2)
