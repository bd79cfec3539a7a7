"""A LoRA run is HF PEFT's LoRA: the same losses from the same start, and files that PEFT reads as they are."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine.config import AdapterConfig
from engine.engine import Engine
from engine.run import Microbatch, Row
from tests.engine.loads import lora
from tests.engine.others import largest_difference, our_logprobs, publish, shake_gently, their_logprobs
from tests.models import smollm2_folder, tiny_model

peft = pytest.importorskip("peft")

STEPS, RATE = 10, 2e-3
CONFIGS = {
    "all modules": lora(8, dropout=0.0),
    "rsLoRA on q and v": lora(4, dropout=0.0, rslora=True, target_modules=("q_proj", "v_proj")),
    "DoRA": lora(8, dropout=0.0, dora=True),
}


def rows_of(step: int) -> list[Row]:
    """Two batches in turn: rows of different lengths, with prompts that the loss does not ask for."""
    draw = np.random.default_rng(step % 2)
    rows = []
    for length in draw.integers(6, 20, size=4):
        start = int(draw.integers(1, length))
        rows.append(Row(draw.integers(0, 500, length), np.arange(start, length), np.ones(length - start)))
    return rows


def our_losses(engine: Engine, config: AdapterConfig, start: Path) -> Iterator[tuple[float, float]]:
    """(mean loss a supervised token, gradient norm) of each optimizer step; `start` gets the adapter before them."""
    run = engine.create_run(config, seed=1)
    publish(engine, run, start)
    for step in range(STEPS):
        rows = rows_of(step)
        num_targets = sum(len(row.targets) for row in rows)
        weighted = [Row(row.tokens, row.targets, row.weights / num_targets) for row in rows]
        (outcome,) = engine.forward_backward([Microbatch(rows=weighted, run=run)])
        yield outcome.loss, engine.optim_step(run, learning_rate=RATE, weight_decay=0.01, max_grad_norm=1.0)


def their_losses(base: PreTrainedModel, start: Path) -> Iterator[tuple[float, float]]:
    """The same by PEFT: rows padded to the longest, and torch's optimizer."""
    model = peft.PeftModel.from_pretrained(base, start, is_trainable=True)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    for step in range(STEPS):
        rows = rows_of(step)
        labels = [np.where(np.isin(np.arange(len(r.tokens)), r.targets), r.tokens, -100) for r in rows]
        loss = model(
            input_ids=pad_sequence([torch.from_numpy(row.tokens) for row in rows], batch_first=True),
            attention_mask=pad_sequence([torch.ones(len(row.tokens)) for row in rows], batch_first=True),
            labels=pad_sequence([torch.from_numpy(x) for x in labels], batch_first=True, padding_value=-100),
        ).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss.detach()), float(norm)


def assert_follows(ours: list[tuple[float, float]], theirs: list[tuple[float, float]], tolerance: float) -> None:
    """Losses to `tolerance`, gradient norms to 50 times that, both relative; and training got somewhere."""
    np.testing.assert_allclose([loss for loss, _ in ours], [loss for loss, _ in theirs], rtol=tolerance)
    np.testing.assert_allclose([norm for _, norm in ours], [norm for _, norm in theirs], rtol=50 * tolerance)
    assert len(ours) == STEPS
    assert ours[-1][0] < 0.98 * ours[1][0]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_ten_losses_are_those_of_peft_from_the_same_start(
    engine: Engine, config: AdapterConfig, tmp_path: Path
) -> None:
    ours = list(our_losses(engine, config, tmp_path))
    assert_follows(ours, list(their_losses(tiny_model(), tmp_path)), tolerance=1e-6)


@pytest.mark.smollm2
def test_ten_losses_on_smollm2_are_those_of_peft_from_the_same_start(smollm2: Engine, tmp_path: Path) -> None:
    ours = list(our_losses(smollm2, lora(8, dropout=0.0), tmp_path))
    base = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)
    assert_follows(ours, list(their_losses(base, tmp_path)), tolerance=2e-5)


@pytest.mark.parametrize(
    "config",
    [
        lora(8, dropout=0.1),
        lora(4, rslora=True),
        lora(2, alpha=3.5, target_modules=("o_proj", "down_proj")),
        lora(4, dora=True),
    ],
    ids=["all modules", "rsLoRA", "two modules, alpha 3.5", "DoRA"],
)
def test_unmodified_peft_gives_our_logprobs_for_our_files(
    engine: Engine, config: AdapterConfig, tmp_path: Path
) -> None:
    run = engine.create_run(config, seed=0)
    shake_gently(run, 0, 0.2)
    model = peft.PeftModel.from_pretrained(tiny_model(), publish(engine, run, tmp_path)).eval()
    ours = our_logprobs(engine, run)
    assert largest_difference(ours, our_logprobs(engine, None)) > 0.5
    assert largest_difference(ours, their_logprobs(model)) < 1e-5


@pytest.mark.smollm2
def test_unmodified_peft_on_smollm2_gives_our_logprobs_for_our_files(smollm2: Engine, tmp_path: Path) -> None:
    run = smollm2.create_run(lora(16), seed=0)
    shake_gently(run, 0, 0.03)
    base = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, publish(smollm2, run, tmp_path)).eval()
    ours = our_logprobs(smollm2, run)
    assert largest_difference(ours, our_logprobs(smollm2, None)) > 0.5
    assert largest_difference(ours, their_logprobs(model)) < 1e-4
