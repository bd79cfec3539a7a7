"""How much memory there is for runs and their passes, and what each run takes of it. Knows no queue."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import psutil
import torch

from scheduler.snapshot import Footprint
from server.db.tables import Base
from server.memory import head_bytes, recovery_bytes, resident_bytes, token_bytes
from server.settings import Settings

AUTO_SHARE = 0.8
"""Of what is free at start. The rest is for the allocator's own loss, sampling, and what else the machine does."""
_CONTAINER = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Room:
    """What is left of the limit beside the base, for a base as it was published."""

    base: Base
    memory: int

    @classmethod
    def beside(cls, base: Base, limit: int, device: torch.device) -> "Room":
        """With the base loaded, and the head at work in as many passes as may go side by side."""
        heads = torch.get_num_threads() if device.type == "cpu" else 1
        return cls(base, max(0, limit - taken(device) - heads * head_bytes(base)))

    def footprint(self, adapter: str) -> Footprint:
        """Of a run with this resolved adapter, as JSON."""
        return _footprint(self.base, adapter)


@lru_cache(maxsize=1024)
def _footprint(base: Base, adapter_json: str) -> Footprint:
    """Every gang asks for that of each run, and a queue holds many jobs of few configs."""
    adapter = json.loads(adapter_json)
    return Footprint(
        resident=resident_bytes(adapter, base),
        copy=recovery_bytes(adapter, base),
        per_token=token_bytes(adapter, base),
    )


def limit_bytes(settings: Settings, device: torch.device) -> int:
    """What the engine may take in all, with the base; asked before that is loaded."""
    if settings.memory_limit_gib is not None:
        return int(settings.memory_limit_gib * 2**30)
    return taken(device) + int(AUTO_SHARE * free(device))


def taken(device: torch.device) -> int:
    """By this process now; on CUDA of the GPU's memory."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def free(device: torch.device) -> int:
    """On the GPU, or of the machine and of the container that this runs in."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    left = psutil.virtual_memory().available
    most, used = (_read(name) for name in ("memory.max", "memory.current"))
    return left if most is None or used is None else max(0, min(left, most - used))


def _read(name: str) -> int | None:
    """A number of the container's; None where there is none, or no limit."""
    try:
        return int((_CONTAINER / name).read_text())
    except (OSError, ValueError):
        return None
