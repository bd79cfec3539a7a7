"""How small a gang may be: measured at the daemon's start, for the base that it serves."""

import time

import torch

from engine.base_model import BaseModel

FULL_SPEED = 0.95
ROWS = (64, 128, 192, 256, 320, 448, 640, 896, 1280, 1792, 2560, 3584)
CPU_WIDTH = 1024
"""Of a larger matrix a CPU multiplies a part: that shows as much and takes no seconds."""
REPEATS = 4


def measure_fill_min(base: BaseModel, most: int) -> int:
    """The fewest rows, up to `most`, at which the base's largest matmul has 95 % of its best speed."""
    out, width = max(base.shapes.values(), key=lambda shape: shape[0] * shape[1])
    if base.device.type == "cpu":
        out, width = min(out, CPU_WIDTH), min(width, CPU_WIDTH)
    weight = torch.ones(out, width, device=base.device, dtype=base.dtype)
    rows = [count for count in ROWS if count <= most] or [most]
    speeds = {count: count / _seconds(weight.new_ones(count, width), weight) for count in rows}
    return next(count for count in rows if speeds[count] >= FULL_SPEED * max(speeds.values()))


def _seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
    """The best of some: what disturbs a measurement makes it longer."""
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        float((x @ weight.T)[0, 0])  # reading a value waits for the device
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
