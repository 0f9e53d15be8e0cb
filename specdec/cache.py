"""Key-value cache over preallocated buffers with a commit that costs the tree, not the past.

transformers' DynamicLayer concatenates the whole past on every append. These layers write in place into
a buffer that doubles when it is full, and a commit moves at most N columns. Every attention layer gets a
full-length layer, also sliding-window ones: windows are the mask's business, on logical positions, because
a layer that trims by column would evict live tokens once rows of a batch have advanced unequally.

Dimensions: B sequences, H key-value heads, C columns, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

MIN_CAPACITY = 64
WIDTH_STEP = 256
"""Least width of buffers that are handed out whole, and the step between their widths up to four times that."""


class BufferedLayer(DynamicLayer):
    """One attention layer's keys and values, [B, H, C, D] each, of which the first `length` columns are used.

    With `whole` attention is handed a few fixed widths (see `whole_width`) instead of the columns in use: a kernel that
    is compiled for its shapes then sees a few of them, and its mask hides the rest.
    """

    def __init__(self, capacity: int = 0, *, whole: bool = False) -> None:
        super().__init__()
        self.capacity = whole_width(capacity) if whole else capacity
        self.whole, self._least = whole, self.capacity
        self.length = 0
        self._keys = self._values = torch.empty(0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch size, heads and dtype of the first states that arrive."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.capacity = max(self.capacity, MIN_CAPACITY)
        self._keys = _buffer_like(key_states, self.capacity)
        self._values = _buffer_like(value_states, self.capacity)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append columns in place; returns views of everything used, [B, H, length, D], or of the whole width."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        self.reserve(end)
        self._keys[:, :, self.length : end] = key_states
        self._values[:, :, self.length : end] = value_states
        self.use(end)
        if not self.whole:
            return self.used
        width = self.columns_for(end)
        return self._keys[:, :, :width], self._values[:, :, :width]

    def columns_for(self, length: int) -> int:
        """Columns that attention is handed when so many are in use; depends on nothing else."""
        return max(whole_width(length), self._least) if self.whole else length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that attention is handed when so many more have been appended, and the first one's number."""
        return self.columns_for(self.length + query_length), 0

    def reserve(self, length: int) -> None:
        """Make room for so many columns."""
        length = self.columns_for(length)
        if length > self._keys.shape[-2]:
            self._grow(length)

    def _grow(self, at_least: int) -> None:
        self.capacity = max(2 * self._keys.shape[-2], at_least)
        for name in ("_keys", "_values"):
            old: Tensor = getattr(self, name)
            new = _buffer_like(old, self.capacity)
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)

    def use(self, length: int) -> None:
        """Declare the first `length` columns used; `keys` and `values` become views of them."""
        if self.is_initialized:
            self.length = length
            self.keys, self.values = self.used

    @property
    def used(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the columns in use, [B, H, length, D] each; views."""
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns; transformers' convention is a count that is not positive."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes a count of columns to remove as a non-positive number, got {tokens_to_remove}"
            )
        self.use(self.length + tokens_to_remove)

    def reset(self) -> None:
        """Forget everything, buffers included."""
        self.keys = self.values = None
        self._keys = self._values = torch.empty(0)
        self.is_initialized = False
        self.length = 0

    def move(self, sources: Tensor, destinations: Tensor) -> None:
        """Copy columns `sources` [B, A] of each row onto `destinations` [B, A]; reads before it writes."""
        if not self.is_initialized:  # a layer that shares another layer's cache holds nothing
            return
        for buffer in (self._keys, self._values):
            if buffer.shape[0] == 1:
                buffer[:, :, destinations[0]] = buffer[:, :, sources[0]]
            else:
                shape = (-1, buffer.shape[1], -1, buffer.shape[3])
                columns = buffer.gather(2, sources[:, None, :, None].expand(shape))
                buffer.scatter_(2, destinations[:, None, :, None].expand(shape), columns)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows become `beam_idx` of the rows before."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows, in this order. Copies once."""
        if self.is_initialized:
            self._keys = self._keys[indices.to(self._keys.device)]
            self._values = self._values[indices.to(self._values.device)]
            self.use(self.length)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        if self.is_initialized:
            self._keys = self._keys.repeat_interleave(repeats, 0)
            self._values = self._values.repeat_interleave(repeats, 0)
            self.use(self.length)


def whole_width(length: int) -> int:
    """The least of a few widths that holds so many columns: four in each octave."""
    step = max(WIDTH_STEP, 1 << max(length.bit_length() - 3, 0))
    return max(-(-length // step) * step, WIDTH_STEP)


def _buffer_like(states: Tensor, capacity: int) -> Tensor:
    # Zeros, not empty: a masked column still enters the product with weight 0, and 0 * NaN is NaN.
    return states.new_zeros(*states.shape[:2], capacity, states.shape[3])


class KVCache(Cache):
    """A transformers Cache of BufferedLayers; also usable with plain `model.generate`.

    Args:
        num_layers: layers of the model.
        capacity: columns to allocate at first use, when the final length is known.
        whole_buffers: hand out a few fixed widths, for attention that is compiled for its shapes.
    """

    def __init__(self, num_layers: int, capacity: int = 0, *, whole_buffers: bool = False) -> None:
        self.whole_buffers = whole_buffers
        self.buffers = [BufferedLayer(capacity, whole=whole_buffers) for _ in range(num_layers)]
        super().__init__(layers=list(self.buffers))

    def columns_for(self, length: int) -> int:
        """Columns that attention is handed when so many are in use."""
        return self.buffers[0].columns_for(length) if self.buffers else length

    def keep(self, kept: list[list[int]], starts: list[int], length: int) -> None:
        """Commit: move columns `kept[b]` of row b to `starts[b]` onwards, then cut every layer to `length`.

        Cost is proportional to the columns kept, not to the past. Nothing moves when they already lie
        in place, as for the prefix of a chain at batch 1.
        """
        width = max(len(columns) for columns in kept)
        sources = [[*columns, *[columns[-1] if columns else length - 1] * (width - len(columns))] for columns in kept]
        destinations = []
        for columns, start in zip(kept, starts, strict=True):
            ends = range(start, start + len(columns))
            # Padding repeats the row's last move (or maps a column onto itself), so it changes nothing.
            destinations.append([*ends, *[ends[-1] if columns else length - 1] * (width - len(columns))])
        if sources != destinations:
            device = self._device()
            source, destination = torch.tensor(sources, device=device), torch.tensor(destinations, device=device)
            for layer in self.buffers:
                layer.move(source, destination)
        self.cut(length)

    def reorder(self, sources: list[list[int]], start: int, num_layers: int) -> None:
        """Columns from `start` on become `sources[b]` of row b, in the first layers; later columns are forgotten."""
        device = self._device()
        source = torch.tensor(sources, device=device)
        destination = torch.arange(start, start + source.shape[1], device=device).expand_as(source)
        for layer in self.buffers[:num_layers]:
            if layer.is_initialized:
                layer.reserve(start + source.shape[1])
                layer.move(source, destination)
                layer.use(start + source.shape[1])

    def cut(self, length: int) -> None:
        """Forget the columns from `length` on, in every layer."""
        for layer in self.buffers:
            layer.use(length)

    def _device(self) -> torch.device:
        return next(layer.used[0].device for layer in self.buffers if layer.is_initialized)

    @staticmethod
    def copy_of(cache: Cache, num_layers: int, capacity: int = 0, *, whole_buffers: bool = False) -> KVCache:
        """The contents of a user's cache in buffers of our own.

        A sliding-window layer keeps only its last columns; the forgotten ones become zeros, which lie outside
        the window of every later position and are masked there.
        """
        copy = KVCache(num_layers, capacity, whole_buffers=whole_buffers)
        for index, (ours, theirs) in enumerate(zip(copy.buffers, cache.layers, strict=False)):
            keys, values = getattr(theirs, "keys", None), getattr(theirs, "values", None)
            if keys is None or values is None or keys.numel() == 0:
                continue
            missing = cache.get_seq_length(index) - keys.shape[-2]
            if missing > 0:
                keys = torch.cat([keys.new_zeros(*keys.shape[:2], missing, keys.shape[3]), keys], 2)
                values = torch.cat([values.new_zeros(*values.shape[:2], missing, values.shape[3]), values], 2)
            ours.update(keys, values)
        return copy

    def row(self, index: int, length: int) -> KVCache:
        """A copy of the first `length` columns of one row."""
        copy = KVCache(len(self.buffers))
        for ours, theirs in zip(copy.buffers, self.buffers, strict=True):
            if theirs.is_initialized:
                keys, values = theirs.used
                ours.update(keys[index : index + 1, :, :length], values[index : index + 1, :, :length])
        return copy

    @staticmethod
    def of_rows(rows: list[KVCache]) -> KVCache:
        """One cache of several single rows, padded with zero columns on the right."""
        whole = KVCache(len(rows[0].buffers))
        for index, layer in enumerate(whole.buffers):
            parts = [row.buffers[index] for row in rows]
            if not parts[0].is_initialized:
                continue
            longest = max(part.length for part in parts)
            for part in parts:
                keys, values = part.used
                missing = longest - part.length
                part.update(
                    keys.new_zeros(*keys.shape[:2], missing, keys.shape[3]),
                    values.new_zeros(*values.shape[:2], missing, values.shape[3]),
                )
            layer.update(torch.cat([part.used[0] for part in parts]), torch.cat([part.used[1] for part in parts]))
        return whole

    def write_back(self, cache: Cache) -> None:
        """Store our columns in the user's dynamic cache, as plain `generate` would have left it."""
        cache.reset()
        for index, layer in enumerate(self.buffers):
            if layer.is_initialized:
                keys, values = layer.used
                cache.update(keys.clone(), values.clone(), index)
