"""Keys and values that a sequence keeps while it is sampled.

Legend: G key/value heads, L new tokens, M tokens so far, C head width.
"""

from torch import Tensor


class KeyValueCache:
    """The keys and values of one sequence while it is sampled: per layer [G, capacity, C]."""

    def __init__(self, num_layers: int, capacity: int):
        self.length = 0  # tokens held before the pass under way
        self._capacity = capacity
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append [1, G, L, C] and return all [1, G, M, C]."""
        if self._layers[layer] is None:
            shape = (*key.shape[:2], self._capacity, key.shape[3])
            self._layers[layer] = (key.new_empty(shape), value.new_empty((*shape[:3], value.shape[3])))
        keys, values = self._layers[layer]  # type: ignore[misc]
        stop = self.length + key.shape[2]
        keys[:, :, self.length : stop] = key
        values[:, :, self.length : stop] = value
        return keys[:, :, :stop], values[:, :, :stop]
