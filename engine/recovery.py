"""A run's whole state as two files: `state.safetensors` and `run.json`. Knows no epochs and no rows of a table."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.adapter import Adapter
from engine.config import AdapterConfig
from engine.device import to_host
from engine.errors import EngineError
from engine.optimizer import AdamW
from engine.run import Run

SCHEMA = 2
"""Raised when these files change, together with a migration: so an older version refuses the whole database, and never
has to fail the jobs whose points it cannot read. Make golden files of it (`tests.golden.make`)."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of a run in host memory: it can be written by another thread while training goes on."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def capture(run: Run) -> Snapshot:
    """Copy the run. The gradient is kept only in the middle of an optimizer step; elsewhere it is zero."""
    tensors = {"parameters": run.adapter.flat, "first": run.optimizer.first, "second": run.optimizer.second}
    if run.microbatch:
        tensors["gradient"] = run.gradient
    state = {
        "schema": SCHEMA,
        "config": run.adapter.config.as_dict(),
        "seed": run.seed,
        "step": run.step,
        "microbatch": run.microbatch,
    }
    return Snapshot(to_host(tensors), state)


def write(snapshot: Snapshot, folder: Path) -> None:
    save_file(snapshot.tensors, folder / "state.safetensors")
    (folder / "run.json").write_text(json.dumps(snapshot.state, sort_keys=True))


def read(folder: Path, empty_adapter: Callable[[AdapterConfig], Adapter], device: torch.device) -> Run:
    """The run that was captured.

    Raises:
        EngineError: another schema, or tensors that do not fit the configuration.
    """
    state = json.loads((folder / "run.json").read_text())
    if state["schema"] != SCHEMA:
        raise EngineError(
            f"this recovery point has schema {state['schema']}, this engine reads {SCHEMA}; "
            "start the version of Mixloom that wrote it"
        )
    tensors = {name: tensor.to(device) for name, tensor in load_file(folder / "state.safetensors").items()}
    adapter = empty_adapter(AdapterConfig.from_dict(state["config"]))
    if tensors["parameters"].shape != adapter.flat.shape:
        raise EngineError(
            f"this recovery point has {tensors['parameters'].numel()} parameters, "
            f"the configuration has {adapter.flat.numel()}"
        )
    adapter.flat.copy_(tensors["parameters"])
    gradient = tensors.get("gradient", torch.zeros_like(adapter.flat))
    optimizer = AdamW(tensors["first"], tensors["second"], state["step"])
    return Run(adapter, state["seed"], gradient, optimizer, state["microbatch"])
