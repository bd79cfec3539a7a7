"""After a rehearsal no pass of a job compiles a loop."""

import subprocess
import sys

COMPILED = """
import torch
from numba.core.event import RecordingListener, install_listener
from engine.engine import Engine
from engine.rehearsal import rehearse
from tests.engine.loads import LOADS, build
from tests.models import tiny_base

for dtype in (torch.float32, torch.bfloat16):
    engine = Engine(tiny_base(dtype=dtype))
    first, later = RecordingListener(), RecordingListener()
    with install_listener("numba:compile", first):
        rehearse(engine)
    with install_listener("numba:compile", later):
        for load in LOADS.values():
            microbatches = build(load, engine)
            engine.forward_backward(microbatches)
            engine.forward(microbatches)
    print(len(first.buffer), len(later.buffer))
"""


def test_what_a_first_pass_compiles_is_compiled() -> None:
    said = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=True).stdout
    rehearsed, later = zip(*(map(int, line.split()) for line in said.splitlines()), strict=True)
    assert min(rehearsed) > 0
    assert later == (0, 0)
