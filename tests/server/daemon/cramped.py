"""A process of `test_memory`: a pass of a microbatch of eight rows with less memory than it takes, then eight of one.

Prints what the large one came to, and whether the small ones give what they gave with all the memory that there is.
"""

import hashlib
import re
import resource
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine.base_model import BaseModel
from engine.engine import Engine
from engine.run import Microbatch, Row, Run
from server.daemon.memory import bytes_asked, is_out_of_memory
from tests.engine.gangs import fingerprint
from tests.engine.loads import lora, mixlora

ROOM = 200 * 2**20
"""Bytes: more than a pass of one row takes, less than one of eight."""


def build() -> Engine:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=503,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    return Engine(BaseModel(model, name="middling", hash_="middling", microbatch_tokens=512))


def microbatch(run: Run, num_rows: int) -> Microbatch:
    tokens = np.random.default_rng(run.seed).integers(0, 500, 512)
    return Microbatch(rows=[Row(tokens, np.arange(1, 512), np.full(511, 1 / 511))] * num_rows, run=run)


def train(engine: Engine) -> str:
    """The hash of eight adapters after a step of one row each."""
    runs = [engine.create_run(mixlora(8, 8, 2) if seed % 2 else lora(8), seed) for seed in range(8)]
    for run in runs:
        engine.forward_backward([microbatch(run, 1)])
        engine.optim_step(run, learning_rate=0.01)
    return hashlib.sha256("".join(map(fingerprint, runs)).encode()).hexdigest()


def main() -> None:
    torch.set_num_threads(1)
    engine = build()
    before = train(engine)
    taken = re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())
    assert taken is not None
    resource.setrlimit(resource.RLIMIT_AS, (int(taken[1]) * 1024 + ROOM, resource.RLIM_INFINITY))
    try:
        engine.forward_backward([microbatch(engine.create_run(mixlora(8, 8, 2), 0), 8)])
        print("fitted")
    except Exception as error:
        print("out of memory" if is_out_of_memory(error) and (bytes_asked(error) or 0) > 0 else repr(error))
    print(before == train(engine))


if __name__ == "__main__":
    main()
