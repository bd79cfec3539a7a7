"""What a figure was measured on, and the memory that a process took."""

import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import psutil
import torch

from engine import mkl
from engine.probe import choose_device, choose_dtype, probe
from server.children import WAITING

_OURS = (*WAITING, "MALLOC_ARENA_MAX", "MKL_CBWR")
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Choice:
    """What a benchmark computes on, and in which type of numbers."""

    device: str
    dtype: str
    gigaflops: dict[str, float]
    """Of a matmul, by type: what `auto` chooses by."""

    def describe(self) -> dict[str, Any]:
        """`describe` of the device, with these figures."""
        return describe(self.device) | {"gigaflops": self.gigaflops}


def choose(wanted: str) -> Choice:
    """The best device that there is, and the wanted type; `auto` is the faster one."""
    device = choose_device("auto")
    probed = probe(device)
    return Choice(device, choose_dtype(probed, device) if wanted == "auto" else wanted, probed)


def describe(device: str) -> dict[str, Any]:
    """The class of the machine and the versions that a figure depends on. No name, no path, no address."""
    cpu, flags = _cpu()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "mkl": mkl.mode(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "peft")},
    }


def synchronize(device: str) -> None:
    """Wait until the device has done all that was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()


def cpu_seconds() -> float:
    """What this process and those that it started have computed, all threads together."""
    children = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(times.user + times.system for times in children)


def peak_bytes(device: str) -> int:
    """The most memory at once so far: of this process or one that it started; of the GPU where that is the device."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if Path("/proc/self/status").exists():  # `ru_maxrss` of a child starts at its parent's size
        me = psutil.Process()
        return max(_high_water(process.pid) for process in [me, *me.children(recursive=True)])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _high_water(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def fresh_processes(device: str, *, preload: str) -> BaseContext:
    """How to start processes that have computed nothing yet; where it is safe, with a module loaded once for all."""
    if device == "cuda" or sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    return context


@contextmanager
def defaults() -> Iterator[None]:
    """Processes that are started meanwhile compute as torch does by default, and not as our server does."""
    ours = {name: os.environ.pop(name, None) for name in _OURS}
    os.environ["MKL_CBWR"] = "OFF"  # else the engine, if they import it, would ask for its mode
    try:
        yield
    finally:
        del os.environ["MKL_CBWR"]
        os.environ.update({name: value for name, value in ours.items() if value is not None})


def _cpu() -> tuple[str, list[str]]:
    """(model name, flags); no flags where the system does not list them."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine(), []
    fields = dict(line.partition(":")[::2] for line in info.read_text().split("\n\n")[0].splitlines())
    values = {name.strip(): value.strip() for name, value in fields.items()}
    return values.get("model name", platform.machine()), values.get("flags", "").split()
