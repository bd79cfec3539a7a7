"""Named loads: what rides together in one pass."""

from dataclasses import dataclass

import numpy as np
import torch

from engine.config import AdapterConfig
from engine.engine import Engine
from engine.run import Microbatch, Row, Run
from tests.models import VOCABULARY

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def lora(rank: int = 4, **changes) -> AdapterConfig:
    return AdapterConfig(
        **({"method": "lora", "rank": rank, "alpha": 2 * rank, "dropout": 0.1, "target_modules": ALL} | changes)
    )


def mixlora(rank: int = 4, experts: int = 4, top_k: int = 2, **changes) -> AdapterConfig:
    return AdapterConfig(
        **(
            {
                "method": "mixlora",
                "rank": rank,
                "alpha": 2 * rank,
                "dropout": 0.1,
                "target_modules": ALL,
                "num_experts": experts,
                "top_k": top_k,
                "router_aux_loss_coef": 0.01,
            }
            | changes
        )
    )


@dataclass(frozen=True)
class Load:
    """Adapters, and the lengths of the rows of each microbatch with the index of its adapter."""

    adapters: list[AdapterConfig]
    microbatches: list[tuple[int, list[int]]]


LOADS = {
    "one job": Load([mixlora()], [(0, [7, 12])]),
    "four different": Load(
        [mixlora(), mixlora(8, 8, 3), lora(), mixlora(2, 3, 1)],
        [(0, [9]), (1, [5, 6]), (2, [11]), (3, [4, 4, 4])],
    ),
    "some of one config": Load(
        [mixlora(8), lora(8), mixlora(8), mixlora(), lora(8), mixlora(8)],
        [(0, [9]), (1, [5, 6]), (2, [11, 3]), (3, [6]), (4, [4, 4, 4]), (5, [20]), (1, [7])],
    ),
    "skewed sizes": Load([mixlora(), lora(), mixlora()], [(0, [60, 50]), (1, [2]), (2, [3])]),
    "mixed ranks, alphas and dropouts": Load(
        [lora(1, alpha=16), lora(16, dropout=0.0), mixlora(2, alpha=1, dropout=0.5), mixlora(13, alpha=7.5)],
        [(0, [8]), (1, [8]), (2, [8]), (3, [8])],
    ),
    "LoRA beside MixLoRA": Load([lora(), mixlora()], [(0, [10, 3]), (1, [6, 9])]),
    "two segments of one job": Load([mixlora(), lora()], [(0, [6, 5]), (1, [7]), (0, [9]), (0, [4])]),
    "a sequence of one token": Load([mixlora(), lora()], [(0, [1, 8]), (1, [5, 1])]),
    "experts that get no token": Load([mixlora(4, 16, 2), lora()], [(0, [3]), (1, [6])]),
    "top_k is 1": Load([mixlora(4, 4, 1), mixlora()], [(0, [9]), (1, [9])]),
    "top_k is num_experts": Load([mixlora(4, 4, 4), mixlora()], [(0, [9]), (1, [9])]),
    "attention only beside feed-forward only": Load(
        [
            lora(target_modules=("q_proj", "v_proj")),
            mixlora(target_modules=("gate_proj", "up_proj", "down_proj")),
            mixlora(target_modules=("down_proj",)),
            mixlora(target_modules=("q_proj", "up_proj")),
            lora(target_modules=("v_proj", "o_proj", "k_proj", "q_proj", "gate_proj", "down_proj", "up_proj")),
        ],
        [(0, [9]), (1, [8]), (2, [7]), (3, [6]), (4, [5])],
    ),
    "DoRA beside MixDoRA and MixLoRA": Load(
        [lora(dora=True), mixlora(dora=True), mixlora(), mixlora(2, 8, 3, dora=True, rslora=True)],
        [(0, [9, 2]), (1, [8]), (2, [5]), (3, [4, 6])],
    ),
    "MixDoRA on some modules": Load(
        [
            mixlora(dora=True, target_modules=("gate_proj", "o_proj")),
            mixlora(dora=True, target_modules=("down_proj",)),
            mixlora(dora=True, dropout=0.0, target_modules=("up_proj", "down_proj")),
            lora(dora=True, dropout=0.0, target_modules=("v_proj", "down_proj")),
        ],
        [(0, [9]), (1, [8]), (2, [7]), (3, [6]), (1, [5])],
    ),
    "experts' modules in other orders": Load(
        [
            mixlora(target_modules=("up_proj", "gate_proj", "down_proj")),
            mixlora(target_modules=("gate_proj", "down_proj", "up_proj")),
        ],
        [(0, [9, 4]), (1, [8])],
    ),
    "rsLoRA and no dropout": Load([lora(rslora=True, dropout=0.0), mixlora(dropout=0.0)], [(0, [9]), (1, [8])]),
}


def shake(run: Run, seed: int) -> None:
    """Weights as after some training: with B = 0 half of the gradients would be zero."""
    draw = torch.Generator().manual_seed(seed)
    run.adapter.flat.copy_(torch.randn(run.adapter.flat.shape, generator=draw, dtype=torch.float64) * 0.2)


def random_row(length: int, draw: np.random.Generator) -> Row:
    tokens = draw.integers(0, VOCABULARY, length)
    targets = np.flatnonzero(draw.random(length) < 0.6)
    targets = targets[targets > 0]
    return Row(tokens, targets, draw.normal(size=len(targets)))


def build(load: Load, engine: Engine, seed: int = 0) -> list[Microbatch]:
    """The load's microbatches over fresh, shaken runs; the last row of each microbatch has a target."""
    draw = np.random.default_rng(seed)
    runs = [engine.create_run(config, seed=index) for index, config in enumerate(load.adapters)]
    for index, run in enumerate(runs):
        shake(run, index)
    microbatches = []
    for index, lengths in load.microbatches:
        rows = [random_row(length, draw) for length in lengths]
        microbatches.append(Microbatch(rows=rows, run=runs[index], auxiliary_weight=float(draw.random())))
    return microbatches


def beside_one_that_is_broken(engine: Engine, config: AdapterConfig) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Gradients of two jobs of one config: of each (beside a third, beside that one broken by weights of NaN)."""
    gradients = []
    for broken in (False, True):
        runs = [engine.create_run(config, seed) for seed in range(3)]
        for seed, run in enumerate(runs):
            shake(run, seed)
        if broken:
            runs[1].adapter.flat.fill_(torch.nan)
        rows = [random_row(20, np.random.default_rng(seed)) for seed in range(3)]
        engine.forward_backward([Microbatch(rows=[row], run=run) for row, run in zip(rows, runs, strict=True)])
        gradients.append([run.gradient for run in runs])
    whole, beside = gradients
    assert beside[1].isnan().any()
    return [(whole[index], beside[index]) for index in (0, 2)]
