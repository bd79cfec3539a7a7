"""HF PEFT as its users run it: LoRA, one job after another, each batch padded to its longest row."""

import warnings

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.bases import DROPOUT, LEARNING_RATE, LORA, MAX_GRAD_NORM, target_modules
from benchmarks.data import Step
from engine.run import Row

IGNORED = -100
"""The label that transformers' loss leaves out."""


class Peft:
    """One adapter stands for every job, so that memory holds what one job needs.

    As transformers' trainer does by default: float32 adapter weights (PEFT's default too), the fused AdamW, the
    gradient clipped, and on a bfloat16 base the forward under autocast (faster than without).
    """

    def __init__(self, model: PreTrainedModel):
        config = LoraConfig(
            r=int(LORA["rank"]),
            lora_alpha=int(LORA["alpha"]),
            lora_dropout=DROPOUT,
            target_modules=list(target_modules(model)),
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():  # PEFT reads what transformers 5 calls by another name
            warnings.simplefilter("ignore", FutureWarning)
            self.model = get_peft_model(model, config).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        self.trainable_parameters = sum(p.numel() for p in self.parameters)

    def step(self, step: Step) -> float:
        device = self.model.device
        with_autocast = self.model.dtype == torch.bfloat16
        losses = []
        for rows in step:
            inputs = {name: tensor.to(device) for name, tensor in collate(rows).items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=with_autocast):
                loss = self.model(**inputs, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.detach())
        return float(losses[0])


def collate(rows: list[Row]) -> dict[str, Tensor]:
    """One batch, padded on the right to its longest row: int64 [rows, longest] each."""
    shape = len(rows), max(len(row.tokens) for row in rows)
    tokens, mask, labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, IGNORED)
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)] = row.tokens
        mask[index, : len(row.tokens)] = 1
        labels[index, row.targets] = row.tokens[row.targets]
    named = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in named.items()}
