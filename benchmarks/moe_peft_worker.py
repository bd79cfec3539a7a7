"""MoE-PEFT's side of its contender: runs in an environment of its own and speaks JSON, a line each way.

The first line says what to train; each line after it is a step: of every job the rows, of every row the tokens and
which of them are supervised. Trained is as MoE-PEFT's own trainer does it, with its optimizer, eager attention and
recomputation: all jobs in one batch, padded to the longest row of all.
"""

import json
import os
import sys
from typing import Any

PADDING = 0
IGNORED = -100
"""The label that the loss leaves out."""


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the library prints is no answer
    trainer = None
    for line in sys.stdin:
        asked = json.loads(line)
        if trainer is None:
            trainer = Trainer(**asked)
            answer = {"trainable_parameters": trainer.trainable_parameters}
        else:
            answer = {"loss": trainer.step(asked)}
        print(json.dumps(answer), file=answers, flush=True)


class Trainer:
    """As many MixLoRA jobs as `jobs`, on one base."""

    def __init__(
        self, base: str, dtype: str, jobs: int, adapter: dict[str, Any], learning_rate: float, weight_decay: float
    ):
        import moe_peft
        import torch
        from moe_peft.adapters import lora_config_factory

        self.model = moe_peft.LLMModel.from_pretrained(base, device="cpu", load_dtype=getattr(torch, dtype))
        self.configs = {}
        for name in (f"job{number}" for number in range(jobs)):
            self.model.init_adapter(lora_config_factory({"name": name, "task_name": "casual", **adapter}))
            weights = self.model.get_adapter_weight_dict(name)
            config = moe_peft.TrainConfig.from_config(
                {"name": name, "num_epochs": 1, "batch_size": 1, "lr": learning_rate, "weight_decay": weight_decay}
            )
            config.prepare(weights)
            config.prepare_lr_scheduler(len_dataset=1)
            self.configs[name] = config
        self.trainable_parameters = sum(weight.numel() for weight in weights.values() if weight.requires_grad)

    def step(self, jobs: list[list[dict[str, list[int]]]]) -> float:
        """One optimizer step of every job; the loss of the first."""
        from moe_peft import LLMBatchConfig, LLMModelInput

        tokens, masks, labels = padded([row for rows in jobs for row in rows])
        ends = [sum(map(len, jobs[: number + 1])) for number in range(len(jobs))]
        ranges = zip(self.configs, [0, *ends], ends)  # noqa: B905 - one start too many
        outputs = self.model.forward(
            LLMModelInput(
                batch_configs_=[LLMBatchConfig(name, start, end) for name, start, end in ranges],
                batch_tokens_=tokens,
                batch_masks_=masks,
                batch_labels_=labels,
                gradient_checkpoint_="recompute",
            )
        )
        loss = float(outputs[0].loss)
        sum(output.loss + output.aux_loss for output in outputs).backward()
        for output in outputs:
            self.configs[output.adapter_name].step()
        return loss


def padded(rows: list[dict[str, list[int]]]) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """(tokens, attention masks, labels), each as long as the longest row, padded on the right."""
    longest = max(len(row["tokens"]) for row in rows)
    tokens, masks, labels = [], [], []
    for row in rows:
        missing, supervised = longest - len(row["tokens"]), set(row["targets"])
        tokens.append(row["tokens"] + [PADDING] * missing)
        masks.append([1] * len(row["tokens"]) + [0] * missing)
        kept = [token if place in supervised else IGNORED for place, token in enumerate(row["tokens"])]
        labels.append(kept + [IGNORED] * missing)
    return tokens, masks, labels


if __name__ == "__main__":
    main()
