"""No layer asks a GPU for a value: the CPU waits when a pass has been queued to the end of its backward, not before.

On the device `meta` no tensor has a value, so whatever asks for one fails there. The first to ask must be what reads
the pass's results.
"""

import traceback
from collections.abc import Iterator

import pytest
import torch

from engine.base_model import BaseModel
from engine.engine import Engine
from engine.families import FAMILIES
from tests.engine.loads import LOADS, build
from tests.models import tiny_model

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.cuda,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can see"),
    ],
)
DTYPES = [torch.float32, torch.bfloat16]
"""Attention and experts go different ways: only for bfloat16 are there kernels for packs and for groups."""


@pytest.fixture(params=["meta", CUDA])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param
    if request.param == "cuda":
        torch.cuda.set_sync_debug_mode("default")


def first_wait(
    device: str, load: str, dtype: torch.dtype, model_type: str = "llama", *, recompute: bool = False
) -> str:
    """The function of ours in which the CPU first waits."""
    model = tiny_model(model_type, dtype).to(torch.device(device))
    engine = Engine(BaseModel(model, name="tiny", hash_="tiny", microbatch_tokens=128, recompute=recompute))
    microbatches = build(LOADS[load], engine)
    if device == "cuda":
        engine.forward_backward(microbatches)  # what is loaded and allocated at the first use of all may wait
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    with pytest.raises((NotImplementedError, RuntimeError), match=r"(?i)meta|synchronizing") as waited:
        engine.forward_backward(microbatches)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    return [frame.name for frame in traceback.extract_tb(waited.tb) if "/engine/" in frame.filename][-1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("load", LOADS)
def test_a_pass_is_queued_as_a_whole(device: str, load: str, dtype: torch.dtype) -> None:
    assert first_wait(device, load, dtype) == "_outcomes"


def test_a_router_that_looks_is_found(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.device.may_look", lambda device: True)
    assert first_wait(device, "one job", torch.float32) == "_place"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_so_it_is_of_every_family_and_with_recomputation(device: str, model_type: str) -> None:
    for recompute in (False, True):
        for dtype in DTYPES:
            assert first_wait(device, "LoRA beside MixLoRA", dtype, model_type, recompute=recompute) == "_outcomes"
