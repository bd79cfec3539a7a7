"""AdamW over the flat vector is torch's AdamW after torch's clipping."""

import math

import pytest
import torch

from engine.optimizer import AdamW

SIZE, STEPS = 501, 30
SETTINGS = {
    "as a job": {"weight_decay": 0.0, "max_grad_norm": 1.0},
    "weight decay": {"weight_decay": 0.1, "max_grad_norm": 1.0},
    "other betas and eps": {"weight_decay": 0.01, "max_grad_norm": 1.0, "betas": (0.8, 0.95), "eps": 1e-4},
    "never clipped": {"weight_decay": 0.0, "max_grad_norm": 0.0},
    "clipped now and then": {"weight_decay": 0.0, "max_grad_norm": 25.0},
}


def learning_rate(step: int) -> float:
    return 0.01 / (1 + step)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_thirty_steps_are_those_of_torch(settings: dict, dtype: torch.dtype, tolerance: float) -> None:
    """Gradients of very different sizes, some of them zero; another rate at each step."""
    options = {"betas": (0.9, 0.999), "eps": 1e-8} | settings
    draw = torch.Generator().manual_seed(0)
    flat = torch.randn(SIZE, generator=draw, dtype=dtype)
    ours = AdamW.zeros_like(flat)
    theirs = flat.clone().requires_grad_()
    optimizer = torch.optim.AdamW(
        [theirs], betas=options["betas"], eps=options["eps"], weight_decay=options["weight_decay"]
    )
    for step in range(STEPS):
        gradient = torch.randn(SIZE, generator=draw, dtype=dtype) * 10.0 ** (step % 5 - 3)
        gradient[::7] = 0
        theirs.grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_([theirs], options["max_grad_norm"] or math.inf)
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        optimizer.step()
        got = ours.update(flat, gradient, learning_rate=learning_rate(step), **options)
        assert got == pytest.approx(float(norm), rel=1e-6)
        torch.testing.assert_close(flat, theirs.detach(), rtol=tolerance, atol=tolerance)
    assert ours.step == STEPS


def test_the_norm_returned_is_that_before_clipping() -> None:
    flat = torch.zeros(4)
    norm = AdamW.zeros_like(flat).update(
        flat,
        torch.full((4,), 5.0),
        learning_rate=0.1,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
    )
    assert norm == 10


def test_a_gradient_that_is_not_a_number_shows_in_the_norm() -> None:
    flat = torch.zeros(4)
    norm = AdamW.zeros_like(flat).update(
        flat,
        torch.tensor([1.0, torch.nan, 0.0, 0.0]),
        learning_rate=0.1,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
    )
    assert math.isnan(norm)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_part_with_a_rate_of_its_own_is_a_parameter_group_of_torch(weight_decay: float) -> None:
    """LoRA+: clipping and moments stay common, the rate and so the decay are the part's."""
    draw = torch.Generator().manual_seed(0)
    flat = torch.randn(SIZE, generator=draw, dtype=torch.float64)
    ours, part = AdamW.zeros_like(flat), slice(100, 350)
    pieces = [flat[:100], flat[part], flat[350:]]
    theirs = [piece.clone().requires_grad_() for piece in pieces]
    groups = [{"params": [theirs[0], theirs[2]]}, {"params": [theirs[1]], "lr": 0.16}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=weight_decay)
    for _ in range(STEPS):
        gradient = torch.randn(SIZE, generator=draw, dtype=torch.float64)
        for parameter, piece in zip(theirs, (gradient[:100], gradient[part], gradient[350:]), strict=True):
            parameter.grad = piece.clone()
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        optimizer.step()
        settings = {"learning_rate": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay}
        ours.update(flat, gradient, **settings, max_grad_norm=1.0, faster=part, ratio=16.0)
    torch.testing.assert_close(flat, torch.cat(theirs).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_no_number_changes_nothing(value: float) -> None:
    flat = torch.randn(SIZE)
    optimizer = AdamW(torch.rand(SIZE), torch.rand(SIZE), step=3)
    before = [tensor.clone() for tensor in (flat, optimizer.first, optimizer.second)]
    gradient = torch.ones(SIZE)
    gradient[17] = value
    norm = optimizer.update(
        flat, gradient, learning_rate=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, max_grad_norm=1.0
    )
    assert not math.isfinite(norm)
    assert all(map(torch.equal, before, (flat, optimizer.first, optimizer.second)))
    assert optimizer.step == 3
