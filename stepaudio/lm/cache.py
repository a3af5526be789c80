"""Keys and values of many rows in memory that is taken once: every row starts at index 0 of its place.

Knows nothing about models or requests. Nothing here waits for the device, but for `move_row`'s copies.
Legend: L layers, B rows (places), G key/value groups, C capacity in tokens, D head width, R new tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


class StaticCache:
    """Storage [L][2, B, G, C, D], keys before values, and how many tokens each row holds: `lengths` int32 [B]."""

    def __init__(
        self,
        layers: int,
        rows: int,
        groups: int,
        capacity: int,
        width: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.rows, self.capacity = rows, capacity
        shape = (2, rows, groups, capacity, width)
        # Zeros, not empty memory: a masked key must be finite, for 0 x NaN is NaN.
        self.storage = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        self._places = torch.arange(rows, device=device)

    @staticmethod
    def bytes_for(layers: int, rows: int, groups: int, capacity: int, width: int, dtype: torch.dtype) -> int:
        """What a cache of these sizes takes."""
        return 2 * layers * rows * groups * capacity * width * dtype.itemsize

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.storage)

    def keys(self, layer: int, rows: int | None = None) -> Tensor:
        """[B, G, C, D] of a layer, or of its first rows."""
        return self.storage[layer][0, :rows]

    def values(self, layer: int, rows: int | None = None) -> Tensor:
        """[B, G, C, D] of a layer, or of its first rows."""
        return self.storage[layer][1, :rows]

    def write_token(self, layer: int, places: Tensor, shared: Tensor) -> None:
        """One token of each of the first b rows: k and v [b, 2 G D] to index `places` int64 [b]."""
        storage = self.storage[layer]
        rows = places.shape[0]
        new = shared.view(rows, 2, storage.shape[2], storage.shape[4])
        storage[:, self._places[:rows], :, places] = new

    def write_tokens(self, layer: int, slots: Tensor, start: int, shared: Tensor) -> None:
        """R tokens of the rows `slots` int64 [n]: k and v [n, R, 2 G D] to indices from `start` on.

        What would lie beyond the capacity (padding alone can) goes to the last index.
        """
        storage = self.storage[layer]
        count, new = shared.shape[:2]
        places = torch.arange(start, start + new, device=storage.device).clamp_(max=self.capacity - 1)
        storage[:, slots[:, None], :, places[None]] = shared.view(count, new, 2, storage.shape[2], storage.shape[4])

    def move_row(self, source: int, target: int, tokens: int) -> None:
        """Copies the first `tokens` tokens of a row, and its length, to another place."""
        for layer in self.storage:
            layer[:, target, :, :tokens] = layer[:, source, :, :tokens]
        self.lengths[target] = self.lengths[source]

    def copy_from(self, other: StaticCache) -> None:
        """Takes over the rows of a smaller cache."""
        for mine, theirs in zip(self.storage, other.storage):
            mine[:, : other.rows, :, : other.capacity] = theirs
        self.lengths[: other.rows] = other.lengths
