"""Attention that never crosses a sequence, plugged into transformers through its attention interface.

On a GPU a pack without caches goes through one kernel; elsewhere each sequence goes by itself. No mask function is
registered: transformers would read the positions for it, and so wait for the GPU.

Legend: T packed tokens, H heads, G key/value heads, L queries, M keys, C head width.
"""

import inspect
import math
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from engine.device import capability
from engine.errors import UnsupportedBase
from engine.passes import Pass
from engine.segments import Batch

_numbers = count()
_WITHOUT_MEANING_HERE = {"position_ids", "use_cache", "cache_position"}
"""Arguments that models hand through: the pass already says what they would say."""
_VARLEN_OPTIONS = set(inspect.signature(varlen_attn).parameters)
_VARLEN_IS_COMPLETE = {"scale", "window_size"} <= _VARLEN_OPTIONS
"""torch 2.10 has neither."""
_GROUPED_HEADS: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in _VARLEN_OPTIONS else {}
"""torch 2.11 takes them unasked."""


def register(pass_: Pass) -> str:
    """Register packed attention over `pass_` and return the name under which a model can ask for it."""
    name = f"mixloom_{next(_numbers)}"

    def packed_attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Queries [1, H, T, C], keys and values [1, G, T, C] -> [1, T, H, C], each sequence by itself."""
        unknown = [k for k, v in others.items() if v is not None and k not in _WITHOUT_MEANING_HERE]
        if unknown or attention_mask is not None or dropout:
            raise UnsupportedBase(f"this model's attention asks for what the engine does not do: {unknown or 'a mask'}")
        batch = pass_.batch
        if softcap is None and one_kernel(query, batch):
            return packed(query, key, value, batch, scaling, sliding_window), None
        dtype = query.dtype
        if dtype is torch.bfloat16 and query.device.type == "cpu":  # half the time, and more exact
            query, key, value = query.float(), key.float(), value.float()
        parts = zip(
            query.split(batch.lengths, dim=2),
            key.split(batch.lengths, dim=2),
            value.split(batch.lengths, dim=2),
            batch.sequence_caches(),
            strict=True,
        )
        outputs = []
        for q, k, v, cache in parts:
            if cache is not None:
                k, v = cache.extend(module.layer_idx, k, v)  # type: ignore[arg-type]
            outputs.append(one_sequence(q, k, v, scaling, sliding_window, softcap))
        return torch.cat(outputs, dim=2).transpose(1, 2).to(dtype), None

    AttentionInterface.register(name, packed_attention)
    return name


def one_kernel(query: Tensor, batch: Batch) -> bool:
    """Whether one kernel serves the whole pack: FlashAttention-2's limits (arXiv:2307.08691), and no caches."""
    return (
        query.device.type != "cpu"
        and _VARLEN_IS_COMPLETE
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and capability(query.device) >= 8
        and not any(batch.sequence_caches())
    )


def packed(
    query: Tensor, key: Tensor, value: Tensor, batch: Batch, scaling: float | None, window: int | None
) -> Tensor:
    """Causal attention within each sequence: [1, H, T, C] over [1, G, T, C] -> [1, T, H, C].

    `window` counts a query's own place, the kernel's only those before it.
    """
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    y = varlen_attn(
        q,
        k,
        v,
        batch.boundaries,
        batch.boundaries,
        max(batch.lengths),
        max(batch.lengths),
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **_GROUPED_HEADS,
    )
    assert isinstance(y, Tensor)
    return y[None]


def one_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of the last L of M positions: [1, H, L, C] over [1, G, M, C] -> [1, H, L, C]."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    window = num_keys if sliding_window is None else min(sliding_window, num_keys)
    mask = None
    if window < num_keys or (1 < num_queries < num_keys) or softcap is not None:
        distance = torch.arange(num_keys - num_queries, num_keys, device=q.device)[:, None] - torch.arange(
            num_keys, device=q.device
        )
        mask = (distance >= 0) & (distance < window)
    if softcap is None:
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and num_queries > 1,
            scale=scaling,
            enable_gqa=True,
        )
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = (q @ k.transpose(2, 3)).float() * (scaling or 1 / math.sqrt(q.shape[3]))
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, -torch.inf)  # type: ignore[operator]
    return scores.softmax(-1).to(q.dtype) @ v
