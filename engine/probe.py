"""What this machine is good at: decides `dtype: auto`, is published with the base, and says how small a gang may be."""

import time

import torch

from engine.base_model import BaseModel

_SIZES = (320, 576, 1536)  # rows (95 % of the speed of many), input, output: a small model's feed-forward
FULL_SPEED = 0.95
ROWS = (64, 128, 192, 256, 320, 448, 640, 896, 1280, 1792, 2560, 3584)
_CPU_WIDTH = 1024  # of a larger matrix a CPU multiplies a part: that shows as much and takes no seconds


def gigaflops(dtype: torch.dtype, device: str) -> float:
    """GFLOP/s of a matmul, the best of three: what disturbs one makes it longer."""
    rows, width, out = _SIZES
    x = torch.randn(rows, width, device=device).to(dtype)
    weight = torch.randn(out, width, device=device).to(dtype)
    return 2 * rows * width * out / min(_seconds(x, weight, 3)) / 1e9


def fewest_rows(base: BaseModel, most: int) -> int:
    """The fewest rows, up to `most`, at which the base's largest matmul has 95 % of its best speed."""
    out, width = max(base.shapes.values(), key=lambda shape: shape[0] * shape[1])
    if base.device.type == "cpu":
        out, width = min(out, _CPU_WIDTH), min(width, _CPU_WIDTH)
    weight = torch.ones(out, width, device=base.device, dtype=base.dtype)
    rows = [count for count in ROWS if count <= most] or [most]
    speeds = {count: count / min(_seconds(weight.new_ones(count, width), weight, 4)) for count in rows}
    return next(count for count in rows if speeds[count] >= FULL_SPEED * max(speeds.values()))


def _seconds(x: torch.Tensor, weight: torch.Tensor, repeats: int) -> list[float]:
    """Of so many matmuls, after one that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        float((x @ weight.T)[0, 0])  # reading a value waits for the device
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def probe(device: str) -> dict[str, float]:
    """GFLOP/s of float32 and bfloat16."""
    return {name: round(gigaflops(getattr(torch, name), device), 1) for name in ("float32", "bfloat16")}


def choose_dtype(probed: dict[str, float], device: str) -> str:
    """bfloat16 on CUDA and wherever it is clearly faster, else float32."""
    return "bfloat16" if device == "cuda" or probed["bfloat16"] > 1.5 * probed["float32"] else "float32"


def choose_device(wanted: str) -> str:
    """`auto` takes CUDA where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
