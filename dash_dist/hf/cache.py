"""Cache layer of transformers for DashAttention: K, V and one summary per whole chunk.

Knows transformers' `Cache` and stage 1; does not know routing. Tensors grow in place, in memory with some room at the
end, so that a new token costs no copy of the older ones.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from dash_kernels import AttentionSpec, ChunkGrid
from dash_kernels.backend import select_backend

Bounds = list[tuple[int, int]]
"""Of each row of a batch: its first token, and one past its last one. The tokens outside are padding."""

_SPARE_TOKENS = 64


class DashCacheLayer(DynamicLayer):
    """K and V of one layer [B, Hkv, S, D], and the summaries of its chunks [B, n, Hkv, D] in the accumulation dtype.

    The chunks of a row count from the row's own first token. A row with fewer whole chunks than n has rubbish in the
    rest. transformers updates K and V; the attention calls `summarize` right after that.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self._forget()

    def _forget(self) -> None:
        self.summaries: torch.Tensor | None = None
        self._rooms: dict[str, torch.Tensor] = {}
        self._starts: list[int] = []  # first token of each row
        self._whole: list[int] = []  # summaries of each row
        self._seen = 0  # tokens at the last call of `summarize`
        self._chunk_size = 1  # of that call

    @staticmethod
    def of(cache: Cache, layer: int) -> DashCacheLayer:
        """The cache of one layer; an empty layer of a `DynamicCache` is replaced by one of this type.

        Raises ValueError for a cache of another type, and for one that another attention has filled.
        """
        while len(cache.layers) <= layer:
            cache.layers.append(DashCacheLayer())
        found = cache.layers[layer]
        if isinstance(found, DashCacheLayer):
            return found
        if type(found) is not DynamicLayer:
            raise ValueError(
                f"layer {layer} of the cache is a {type(found).__name__}: DashAttention needs a DynamicCache; leave "
                "cache_implementation out, or set it to 'dynamic' or 'offloaded'"
            )
        if found.get_seq_length() > 0:
            raise ValueError(
                f"layer {layer} of the cache holds {found.get_seq_length()} tokens that another attention stored: "
                "start with an empty DynamicCache"
            )
        cache.layers[layer] = DashCacheLayer()
        return cache.layers[layer]

    def lazy_initialization(self, key_states: torch.Tensor, *_: Any) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self.values = torch.tensor([], dtype=self.dtype, device=self.device)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append K and V [B, Hkv, T, D]; return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states)
        if self.get_seq_length() == 0:
            self.keys, self.values = key_states, value_states
        else:
            self.keys = self._appended("keys", self.keys, key_states, dim=2)
            self.values = self._appended("values", self.values, value_states, dim=2)
        return self.keys, self.values

    @torch.no_grad()
    def _appended(self, name: str, held: torch.Tensor, new: torch.Tensor, dim: int) -> torch.Tensor:
        before = held.shape[dim]
        size = before + new.shape[dim]
        room = self._rooms.get(name)
        if room is None or not _continues(room, held, size, dim):
            shape = list(held.shape)
            shape[dim] = size + size // 4 + _SPARE_TOKENS
            room = self._rooms[name] = held.new_empty(shape)
            room.narrow(dim, 0, before).copy_(held)
        room.narrow(dim, before, size - before).copy_(new)
        return room.narrow(dim, 0, size)

    @torch.no_grad()
    def summarize(
        self, keys: torch.Tensor, bounds: Bounds | None, summary_query: torch.Tensor, spec: AttentionSpec
    ) -> None:
        """Stage 1 for the chunks that became whole since the last call.

        Args:
            keys: all keys [B, Hkv, S, D], as `update` returned them.
            bounds: of this call's mask; None without padding.

        Raises ValueError if a row starts at another token than before.
        """
        batch, _, length, _ = keys.shape
        rows = bounds or [(0, length)] * batch
        self._check_starts(rows)
        whole = [max(end - start, 0) // spec.chunk_size for start, end in rows]
        before = self._whole or [0] * batch
        if whole != before:
            self._add_summaries(keys, rows, before, whole, summary_query, spec)
        self._starts, self._whole, self._seen = [start for start, _ in rows], whole, length
        self._chunk_size = spec.chunk_size

    def _check_starts(self, rows: Bounds) -> None:
        for row, ((start, _), known) in enumerate(zip(rows, self._starts or [self._seen] * len(rows), strict=True)):
            if start != known and min(start, known) < self._seen:
                raise ValueError(
                    f"row {row} of the batch starts at token {start} now and started at {known} before: pass the "
                    "attention_mask of all tokens so far, the cached ones included, at every call"
                )

    def _add_summaries(
        self,
        keys: torch.Tensor,
        rows: Bounds,
        before: list[int],
        whole: list[int],
        summary_query: torch.Tensor,
        spec: AttentionSpec,
    ) -> None:
        size, uniform = spec.chunk_size, len(set(rows)) == 1 and len(set(before)) == 1
        if uniform:
            start = rows[0][0]
            chunks = keys[:, :, start + before[0] * size : start + whole[0] * size].transpose(1, 2)
        else:
            new = [(row, chunk) for row in range(len(rows)) for chunk in range(before[row], whole[row])]
            firsts = torch.tensor([rows[row][0] + chunk * size for row, chunk in new], device=keys.device)
            row_ids, chunk_ids = torch.tensor(new, device=keys.device).T
            tokens = firsts[:, None] + torch.arange(size, device=keys.device)
            chunks = keys[row_ids[:, None], :, tokens].flatten(0, 1).unsqueeze(0)
        backend = select_backend("auto", chunks, keys.shape[1], spec)
        grid = ChunkGrid.packed((0, chunks.shape[1]), size)
        made = backend.summarize(chunks, grid, summary_query, spec)
        summaries = made.new_zeros(keys.shape[0], 0, *made.shape[2:]) if self.summaries is None else self.summaries
        missing = max(whole) - summaries.shape[1]
        if missing > 0:
            shape = summaries.shape[0], missing, *summaries.shape[2:]
            summaries = self._appended("summaries", summaries, made.new_zeros(shape), dim=1)
        if _frozen(summaries):
            summaries = summaries.clone()
        if uniform:
            summaries[:, before[0] : whole[0]] = made
        else:
            summaries[row_ids, chunk_ids] = made[0]
        self.summaries = summaries

    def offload(self) -> None:
        super().offload()
        self._rooms.pop("keys", None)
        self._rooms.pop("values", None)

    def reset(self) -> None:
        self.keys = self.values = torch.tensor([])
        self.is_initialized = False
        self._forget()

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Remove the last tokens, as `DynamicLayer` does, and the summaries of the chunks that they belong to."""
        super().crop(*args, **kwargs)
        length = self.get_seq_length()
        if length == 0:
            self._forget()
            return
        self._seen = min(self._seen, length)
        self._starts = [min(start, length) for start in self._starts]
        pairs = zip(self._whole, self._starts, strict=True)
        self._whole = [min(whole, (length - start) // self._chunk_size) for whole, start in pairs]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(len(self._starts)).repeat_interleave(repeats)
        super().batch_repeat_interleave(repeats)
        self._select_rows(rows)

    def _select_rows(self, indices: torch.Tensor) -> None:
        if self.summaries is not None:
            self.summaries = self.summaries[indices.to(self.summaries.device)]
        if self._starts:
            rows = torch.arange(len(self._starts))[indices.cpu()].tolist()
            self._starts, self._whole = ([held[row] for row in rows] for held in (self._starts, self._whole))


def check_growing(cache: Cache, layer: int) -> None:
    """Refuse, with ValueError, a cache of a layer without routing whose keys are not those of the tokens so far."""
    found = type(cache.layers[layer]) if layer < len(cache.layers) else DynamicLayer
    if found not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise ValueError(
            f"layer {layer} of the cache is a {found.__name__}: dash_attention needs a DynamicCache; leave "
            "cache_implementation out, or set it to 'dynamic' or 'offloaded'"
        )


def _continues(room: torch.Tensor, held: torch.Tensor, size: int, dim: int) -> bool:
    """Return whether `held` lies at the start of `room`, which can take `size` entries and be written."""
    around = (held.shape[:dim], held.shape[dim + 1 :]) == (room.shape[:dim], room.shape[dim + 1 :])
    return around and room.data_ptr() == held.data_ptr() and room.shape[dim] >= size and not _frozen(room)


def _frozen(tensor: torch.Tensor) -> bool:
    """Return whether PyTorch forbids to write to the tensor here."""
    return tensor.is_inference() and not torch.is_inference_mode_enabled()
