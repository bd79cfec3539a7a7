"""What this machine is good at: decides `dtype: auto` and is published with the base."""

import time

import torch

_SIZES = (512, 576, 1536)  # rows, input, output: near a small model's feed-forward


def gigaflops(dtype: torch.dtype, device: str) -> float:
    """GFLOP/s of a matmul, the median of seven."""
    rows, width, out = _SIZES
    x = torch.randn(rows, width, device=device).to(dtype)
    weight = torch.randn(out, width, device=device).to(dtype)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        float((x @ weight.T)[0, 0])  # reading a value waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * rows * width * out / sorted(seconds[1:])[3] / 1e9


def probe(device: str) -> dict[str, float]:
    """GFLOP/s of float32 and bfloat16."""
    return {name: round(gigaflops(getattr(torch, name), device), 1) for name in ("float32", "bfloat16")}


def choose_dtype(probed: dict[str, float], device: str) -> str:
    """bfloat16 on CUDA and wherever it is clearly faster, else float32."""
    return "bfloat16" if device == "cuda" or probed["bfloat16"] > 1.5 * probed["float32"] else "float32"


def choose_device(wanted: str) -> str:
    """`auto` takes CUDA where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
