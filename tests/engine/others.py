"""What other programs need to judge ours: an adapter's published files, and log-probs of an unpacked model."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import formats
from engine.engine import Engine
from engine.run import Run
from engine.sampling import scoring

SEQUENCES = [[5, 17, 300, 4, 4, 250, 81, 6, 99], [7, 3], [401, 12, 55, 54, 53, 260, 91, 8, 8, 8, 8, 133, 2, 20, 41, 0]]
"""Token ids of every vocabulary in these tests."""


def publish(engine: Engine, run: Run, folder: Path, base_name: str = "tiny") -> Path:
    """The adapter's native files, as the daemon writes them."""
    config = formats.disk_config(run.adapter.config, base_name=base_name, activation=engine.base.activation_name)
    folder.mkdir(parents=True, exist_ok=True)
    formats.write(formats.tensors(run.adapter), config, folder)
    return folder


def shake_gently(run: Run, seed: int, scale: float) -> None:
    """Weights as after some training, of a size at which a deep model still says something."""
    run.adapter.flat.copy_(torch.from_numpy(np.random.default_rng(seed).normal(size=run.adapter.flat.shape)) * scale)


def our_logprobs(engine: Engine, run: Run | None) -> list[Tensor]:
    """Of every token of `SEQUENCES` but the first, in one packed pass without dropout; None: of the base."""
    microbatches = [scoring(sequence, run.adapter if run else None) for sequence in SEQUENCES]
    return [outcome.logprobs[0] for outcome in engine.forward(microbatches)]


@torch.no_grad()
def their_logprobs(model: nn.Module) -> list[Tensor]:
    """The same of another program's model, one sequence at a time."""
    logprobs = []
    for sequence in SEQUENCES:
        tokens = torch.tensor(sequence)
        logits = model(input_ids=tokens[None]).logits[0, :-1]
        logprobs.append(F.log_softmax(logits.float(), -1).gather(1, tokens[1:, None])[:, 0])
    return logprobs


def largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
