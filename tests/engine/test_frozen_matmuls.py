"""The frozen weights are multiplied once a pass, whoever rides in it, and never written to."""

import hashlib
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.base_model import BaseModel
from engine.engine import Engine
from engine.run import Microbatch
from tests.engine.loads import Load, build, lora, mixlora

VIEWS = {"t", "transpose", "view", "_unsafe_view", "detach", "alias", "unsqueeze", "slice", "expand", "permute"}
MATMULS = {"mm", "addmm", "bmm", "baddbmm", "linear", "matmul"}


class FrozenTouches(TorchDispatchMode):
    """Counts, by name, the operations that read a frozen weight; a view of one is the weight still."""

    def __init__(self, base: BaseModel):
        super().__init__()
        self.storages = {p.untyped_storage().data_ptr() for p in base.model.parameters()}
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if name not in VIEWS and any(t.untyped_storage().data_ptr() in self.storages for t in tensors):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


TOKENS = 48
LOADS = {
    "one LoRA job": Load([lora()], [(0, [20, 28])]),
    "one MixLoRA job, 4 experts, top 2": Load([mixlora(4, 4, 2)], [(0, [48])]),
    "one MixLoRA job, 8 experts, top 4": Load([mixlora(4, 8, 4)], [(0, [30, 18])]),
    "one MixLoRA job, all of 16 experts": Load([mixlora(2, 16, 16)], [(0, [48])]),
    "four mixed jobs": Load(
        [lora(), mixlora(4, 4, 2), mixlora(8, 8, 4), lora(16)], [(0, [10]), (1, [4, 8]), (2, [20]), (3, [6])]
    ),
    "eight microbatches": Load([mixlora(), lora()], [(0, [6]), (1, [6])] * 4),
}


def touches(engine: Engine, load: Load) -> Counter[str]:
    microbatches = build(load, engine)
    assert sum(m.num_tokens for m in microbatches) == TOKENS
    with FrozenTouches(engine.base) as counted:
        engine.forward_backward(microbatches)
    return counted.counts


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_frozen_matmuls_grow_with_neither_jobs_nor_experts_nor_top_k(engine: Engine, load: Load) -> None:
    """Once on the way forward and at most once backward for each weight, the head's among them."""
    counts = touches(engine, load)
    assert counts == touches(engine, LOADS["one LoRA job"])
    matmuls = sum(counts[name] for name in MATMULS)
    weights = 7 * engine.base.num_layers + 1
    assert weights < matmuls <= 2 * weights


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_no_operation_makes_a_copy_of_a_frozen_weight(engine: Engine, load: Load) -> None:
    """Or the count above could miss a matmul. Norms multiply by theirs, and the embedding is looked up."""
    assert touches(engine, load).keys() <= MATMULS | {"embedding", "mul"}


def bytes_of(base: BaseModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in base.model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def test_training_neither_writes_to_the_base_nor_leaves_a_gradient_on_it(engine: Engine) -> None:
    parameters = list(engine.base.model.parameters())
    before, versions = bytes_of(engine.base), [p._version for p in parameters]
    microbatches = build(LOADS["four mixed jobs"], engine)
    for _ in range(3):
        engine.forward_backward(microbatches)
        for run in [m.run for m in microbatches]:
            engine.optim_step(run, learning_rate=0.1, weight_decay=0.1)
        engine.forward([Microbatch(rows=m.rows, adapter=m.run.adapter) for m in microbatches])
    assert bytes_of(engine.base) == before
    assert [p._version for p in parameters] == versions
    assert all(p.grad is None and not p.requires_grad for p in parameters)
