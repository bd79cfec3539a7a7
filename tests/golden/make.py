"""Makes the golden files of this version's formats: `python -m tests.golden.make`, once for each new schema.

Those of older schemas stay: they are what upgraded servers have on their disks.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from engine.adapter import Adapter
from engine.config import AdapterConfig
from engine.engine import Engine
from engine.recovery import SCHEMA
from engine.run import Microbatch, Run
from server.daemon.program import Cursor
from server.store import manifest
from tests.engine.loads import lora, mixlora, random_row
from tests.engine.others import publish
from tests.models import tiny_base

FOLDER = Path(__file__).parent
RUNS = {"mixlora": (mixlora(2, 3, 2), 5), "dora": (lora(2, dora=True, rslora=True), 6)}
"""Config and microbatches, of which three are an optimizer step: the first stops in the middle of one."""


def state_of(run: Run) -> dict[str, Any]:
    """All that a run is."""
    tensors = {"gradient": run.gradient, "first": run.optimizer.first, "second": run.optimizer.second}
    return {
        **adapter_of(run.adapter),
        **{name: sha256(tensor) for name, tensor in tensors.items()},
        "seed": run.seed,
        "step": run.step,
        "microbatch": run.microbatch,
    }


def adapter_of(adapter: Adapter) -> dict[str, Any]:
    """All that an adapter is."""
    return {"config": adapter.config.as_dict(), "weights": {name: sha256(part) for name, part in adapter.named()}}


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().astype("<f4").tobytes()).hexdigest()


def trained(engine: Engine, config: AdapterConfig, num_microbatches: int) -> Run:
    draw, run = np.random.default_rng(1), engine.create_run(config, seed=3)
    for number in range(num_microbatches):
        engine.forward_backward([Microbatch(rows=[random_row(9, draw), random_row(14, draw)], run=run)])
        if number % 3 == 2:
            engine.optim_step(run, learning_rate=0.01)
    return run


def make(folder: Path) -> None:
    engine = Engine(tiny_base())
    for name, (config, num_microbatches) in RUNS.items():
        run, place = trained(engine, config, num_microbatches), folder / name
        (place / "point").mkdir(parents=True)
        engine.save(run, place / "point")
        publish(engine, run, place / "adapter")
        known = {
            "point": manifest(place / "point"),
            "cursor": Cursor(run.step, 46 * run.step).as_dict(),
            "state": state_of(run),
            "adapter": manifest(place / "adapter"),
        }
        (place / "known.json").write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    make(FOLDER / f"schema-{SCHEMA}")
