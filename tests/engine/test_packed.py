"""Every packed operation equals the plain loop in float64, over the named loads; placed as on a CPU and as on a GPU."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from engine import router
from engine.adapter import Weights
from engine.config import AdapterConfig
from engine.dropout import Masks
from engine.engine import Engine
from engine.segments import Segment
from engine.stacks import stacked
from tests import models
from tests.engine.loads import LOADS, beside_one_that_is_broken, build, lora, mixlora
from tests.engine.oracle import Oracle
from tests.models import tiny_base


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_base(dtype=torch.float64))


GROUPS = "as on a GPU that multiplies groups"
CASES = [(form, name) for form in ("as on a CPU", "as on a GPU") for name in LOADS] + [(GROUPS, "some of one config")]


@pytest.fixture
def on_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The forms that passes take there: places that nobody looks at, masks, and stacks."""
    on_gpu = request.param != "as on a CPU"
    monkeypatch.setattr("engine.device.may_look", lambda device: not on_gpu)
    if request.param == GROUPS:
        monkeypatch.setattr("engine.grouped.kernel_for", lambda dtype, device: True)
        monkeypatch.setattr("engine.grouped.grouped_mm", grouped_mm)
    return on_gpu


def grouped_mm(x: Tensor, w: Tensor, *, offs: Tensor) -> Tensor:
    """torch's, which takes no float64."""
    ends = offs.tolist()
    parts = [slice(start, end) for start, end in pairwise([0, *ends])]
    if w.dim() == 2:
        return torch.stack([x[:, part] @ w[part] for part in parts])
    return torch.cat([x[part] @ matrix for part, matrix in zip(parts, w, strict=True)])


@pytest.fixture(autouse=True)
def _blocks_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that the experts of these small passes have several, as those of large passes on several threads do."""
    monkeypatch.setattr(router, "BLOCK_ROWS", 32)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("on_gpu", ["as on a CPU"], indirect=True)
def test_experts_of_these_passes_have_several_blocks(
    engine: Engine, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = []
    monkeypatch.setattr(
        router, "_blocks", lambda sizes, made=router._blocks: blocks.append([*made(sizes)]) or blocks[-1]
    )
    engine.forward_backward(build(LOADS["four different"], engine))
    assert max(map(len, blocks)) > 1


@pytest.mark.parametrize(("on_gpu", "name"), CASES, indirect=["on_gpu"])
def test_a_packed_pass_equals_the_plain_loop_with_real_dropout(engine: Engine, on_gpu: bool, name: str) -> None:
    microbatches = build(LOADS[name], engine)
    expected_gradients = {id(m.run): {} for m in microbatches}
    expected_logprobs, seen = [], {id(m.run): 0 for m in microbatches}
    for m in microbatches:
        dropout = m.run.dropout_key(seen[id(m.run)])
        if on_gpu and dropout:
            widths = engine.base.input_widths(m.run.adapter.config)
            dropout = Masks([dropout], [m.num_tokens], widths, engine.base.device)
        logprobs, gradients = Oracle(m.run.adapter, dropout).run(m)
        seen[id(m.run)] += 1
        expected_logprobs.append(logprobs)
        total = expected_gradients[id(m.run)]
        for parameter, gradient in gradients.items():
            total[parameter] = total.get(parameter, 0) + gradient
    outcomes = engine.forward_backward(microbatches)
    for m, outcome, logprobs in zip(microbatches, outcomes, expected_logprobs, strict=True):
        torch.testing.assert_close(torch.cat(outcome.logprobs), torch.cat(logprobs), rtol=1e-10, atol=1e-10)
        for parameter, got in m.run.adapter.layout.named(m.run.gradient):
            want = expected_gradients[id(m.run)][parameter]
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, msg=lambda t, p=parameter: f"{p}: {t}")


@pytest.mark.parametrize("name", ["DoRA beside MixDoRA and MixLoRA", "MixDoRA on some modules"])
def test_no_magnitude_scales_a_bias_of_the_base(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.SPECIAL, "llama", {"mlp_bias": True, "attention_bias": True})
    engine = Engine(tiny_base(dtype=torch.float64))
    assert engine.base.linears[0, "up_proj"].frozen.bias.abs().min() > 0
    microbatches = build(LOADS[name], engine)
    for m, outcome in zip(microbatches, engine.forward(microbatches), strict=True):
        logprobs, _ = Oracle(m.run.adapter, None).run(m)
        torch.testing.assert_close(torch.cat(outcome.logprobs), torch.cat(logprobs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LOADS)
def test_a_packed_forward_equals_the_plain_loop_without_dropout(engine: Engine, name: str) -> None:
    microbatches = build(LOADS[name], engine, seed=3)
    for m, outcome in zip(microbatches, engine.forward(microbatches), strict=True):
        logprobs, _ = Oracle(m.run.adapter, None).run(m)
        torch.testing.assert_close(torch.cat(outcome.logprobs), torch.cat(logprobs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("on_gpu", [GROUPS], indirect=True)
@pytest.mark.parametrize("config", [lora(8), mixlora(8)], ids=["LoRA", "MixLoRA"])
def test_what_is_not_a_number_in_one_job_of_a_stack_reaches_no_other(
    engine: Engine, on_gpu: bool, config: AdapterConfig
) -> None:
    for whole, beside in beside_one_that_is_broken(engine, config):
        torch.testing.assert_close(beside, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("on_gpu", [GROUPS], indirect=True)
def test_microbatches_of_one_config_ride_as_one_but_for_dora(engine: Engine, on_gpu: bool) -> None:
    configs = [mixlora(8), lora(8), mixlora(8), lora(8, dora=True), lora(8, dora=True), lora(8)]
    runs = [engine.create_run(config, seed=0) for config in configs]
    segments = [Segment([torch.arange(5)], Weights.of(run.adapter, engine.base.dtype)) for run in runs]
    riding = stacked([*segments, Segment([torch.arange(5)])], engine.base)
    assert [indices for indices, _ in riding] == [[0, 2], [1, 5], [3], [4], [6]]
