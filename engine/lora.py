"""LoRA beside a frozen linear module: y = xW' + s·dropout(x)A'B' (DESIGN §3).

Legend: T packed tokens, n a segment's tokens, D input width, O output width, R rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.passes import Pass
from engine.segments import ROW_MULTIPLE, Segment


def lora_delta(x_nD: Tensor, segment: Segment, layer: int, module: str, expert: int | None = None) -> Tensor:
    """s·xA'B' for rows that have had their dropout: [n, D] -> [n, O]. Matmuls run in the dtype of `x_nD`.

    The rows are padded to a multiple, since a CPU compiles its bfloat16 kernel anew for each number of rows
    (0.7 ms, 15 times a small matmul), and an expert gets another number at every step.
    """
    assert segment.adapter is not None
    a_RD = segment.parameter(layer, module, "A", expert).to(x_nD.dtype)
    b_OR = segment.parameter(layer, module, "B", expert).to(x_nD.dtype)
    num_rows = len(x_nD)
    x_nD = F.pad(x_nD, (0, 0, 0, -num_rows % ROW_MULTIPLE))
    return F.linear(F.linear(x_nD, a_RD) * segment.adapter.config.scaling, b_OR)[:num_rows]


class LoraLinear(nn.Module):
    """A frozen linear module, run once over the whole pack, with each segment's own LoRA added to its rows."""

    def __init__(self, frozen: nn.Linear, pass_: Pass, layer: int, module: str, input_name: str):
        super().__init__()
        self.frozen = frozen
        self.pass_ = pass_
        self.layer = layer
        self.module = module
        self.input_name = input_name

    def forward(self, x: Tensor) -> Tensor:
        """[1, T, D] -> [1, T, O]."""
        y = self.frozen(x)
        batch = self.pass_.batch
        if not any(segment.targets(self.module) for segment in batch.segments):
            return y
        parts = []
        for (segment, x_nD), (_, y_nO) in zip(batch.split(x[0]), batch.split(y[0]), strict=True):
            if segment is None or not segment.targets(self.module):
                parts.append(
                    y_nO
                )  # never `+ 0`: a segment's bits do not depend on whether its neighbour adds
                continue
            dropped = self.pass_.dropped(x_nD, segment, self.layer, self.input_name)
            parts.append(y_nO + lora_delta(dropped, segment, self.layer, self.module))
        return torch.cat(parts)[None]
