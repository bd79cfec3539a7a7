"""A pass that trains nobody: what a process's first pass compiles and tries, some seconds, no job's pass has to."""

import numpy as np

from engine.config import AdapterConfig
from engine.engine import Engine
from engine.run import Microbatch, Row


def rehearse(engine: Engine) -> None:
    """Forward and backward of two tokens of a LoRA, a MixLoRA and a MixDoRA: together they have all loops."""
    engine.threads_to_share()  # what larger gangs ask
    family = engine.base.family
    lora = {"method": "lora", "rank": 1, "alpha": 1, "dropout": 0.5, "target_modules": family.attention + family.mlp}
    mixture = {**lora, "method": "mixlora", "num_experts": 2, "top_k": 1, "router_aux_loss_coef": 0}
    configs = [AdapterConfig.from_dict(values) for values in (lora, mixture, {**mixture, "dora": True})]
    row = Row(tokens=np.zeros(2, np.int64), targets=np.ones(1, np.int64), weights=np.ones(1))
    engine.forward_backward([Microbatch(rows=[row], run=engine.create_run(config, seed=0)) for config in configs])
