"""A client of its own: what a job does, as a plain loop over the engine's operations."""

from typing import Any

import numpy as np

from engine.config import AdapterConfig
from engine.engine import Engine
from engine.run import Microbatch, Row, Run
from server import curriculum
from server.tokens import TokenRows


def train_by_hand(
    engine: Engine, config: AdapterConfig, training: dict[str, Any], data: TokenRows, parts: list[Any] | None = None
) -> Run:
    """`training` is a job's, resolved; `parts` its mixture."""
    mixture = curriculum.Mixture.of(parts, len(data))
    run = engine.create_run(config, training["seed"])
    schedule = {key: training[key] for key in ("schedule", "warmup_steps", "total_steps")}
    for step in range(training["total_steps"]):
        batch = curriculum.rows_of_step(step, mixture=mixture, batch_size=training["batch_size"], seed=training["seed"])
        num_targets = sum(len(data.row(index)[1]) for index in batch)
        for part in curriculum.cut(batch.tolist(), data.lengths, training["microbatch_tokens"]):
            rows = [Row(t, places, np.full(len(places), 1 / num_targets)) for t, places in map(data.row, part)]
            share = int(data.lengths[part].sum()) / int(data.lengths[batch].sum())
            engine.forward_backward([Microbatch(rows=rows, run=run, auxiliary_weight=share)])
        rate = curriculum.learning_rate(step, peak=training["learning_rate"], **schedule)
        limits = {key: training[key] for key in ("weight_decay", "max_grad_norm")}
        engine.optim_step(run, learning_rate=rate, **limits)
    return run
