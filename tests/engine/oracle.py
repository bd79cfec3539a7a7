"""The plain per-job loop that every packed operation must equal.

Unmodified transformers, one microbatch at a time, sdpa attention (which stays in float64, unlike eager) under a
block-diagonal mask, experts token by token, frozen projections once an expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.adapter import Adapter
from engine.config import AdapterConfig
from engine.random import DropoutKey
from engine.run import Microbatch
from tests.models import tiny_model


class PlainLinear(nn.Module):
    """y = Wx + s·BA d(x)."""

    def __init__(self, frozen: nn.Linear, config: AdapterConfig, a: Tensor, b: Tensor, mask: Tensor | None):
        super().__init__()
        self.frozen, self.config, self.a, self.b, self.mask = frozen, config, a, b, mask

    def forward(self, x: Tensor) -> Tensor:
        dropped = x if self.mask is None else x * self.mask
        return self.frozen(x) + self.config.scaling * (dropped @ self.a.T @ self.b.T)


class PlainExperts(nn.Module):
    """Paper eq. 5 to 7 as written: each token through each of its experts, W2 included."""

    def __init__(self, mlp: nn.Module, oracle: "Oracle", layer: int):
        super().__init__()
        self.mlp, self.oracle, self.layer = mlp, oracle, layer

    def lora(self, module: str, expert: int, x: Tensor) -> Tensor:
        config = self.oracle.config
        if module not in config.target_modules:
            return torch.zeros((), dtype=x.dtype)
        a, b = (self.oracle.parameters[f"{self.layer}.{module}.{expert}.{m}"] for m in "AB")
        return config.scaling * (b @ (a @ x))

    def forward(self, x: Tensor) -> Tensor:
        config, oracle = self.oracle.config, self.oracle
        x = x[0]
        router = oracle.parameters[f"{self.layer}.router.weight"]
        probabilities = torch.softmax(x @ router.T, -1)
        slots: list[list[tuple[int, Tensor]]] = []
        rows_of: list[list[int]] = [[] for _ in range(config.num_experts)]
        for token, probability in enumerate(probabilities):
            best = probability.topk(config.top_k).indices.tolist()
            slots.append([(e, probability[e] / probability[best].sum()) for e in best])
            for expert in best:
                rows_of[expert].append(token)
        fractions = torch.tensor([len(rows) / len(x) for rows in rows_of], dtype=x.dtype)
        oracle.aux.append(config.router_aux_loss_coef * config.num_experts * (fractions * probabilities.mean(0)).sum())
        input_mask = oracle.mask(self.layer, "mlp_input", x)
        outputs = []
        for token, (row, chosen) in enumerate(zip(x, slots, strict=True)):
            dropped = row if input_mask is None else row * input_mask[token]
            output = torch.zeros_like(row)
            for expert, weight in chosen:
                gate = self.mlp.gate_proj(row) + self.lora("gate_proj", expert, dropped)
                up = self.mlp.up_proj(row) + self.lora("up_proj", expert, dropped)
                hidden = self.mlp.act_fn(gate) * up
                shape = hidden.new_empty(len(rows_of[expert]), len(hidden))
                mask = oracle.mask(self.layer, f"down_input.{expert}", shape)
                inner = hidden if mask is None else hidden * mask[rows_of[expert].index(token)]
                output = output + weight * (self.mlp.down_proj(hidden) + self.lora("down_proj", expert, inner))
            outputs.append(output)
        return torch.stack(outputs)[None]


class Oracle:
    """One job's microbatch, forward and gradients, by itself."""

    def __init__(self, adapter: Adapter, dropout: DropoutKey | None, model_type: str = "llama"):
        self.config = adapter.config
        self.dropout = dropout
        self.parameters = {n: p.detach().clone().requires_grad_() for n, p in adapter.named()}
        self.aux: list[Tensor] = []
        self.model = tiny_model(model_type, torch.float64)
        self.model.set_attn_implementation("sdpa")

    def mask(self, layer: int, input_name: str, like: Tensor) -> Tensor | None:
        return self.dropout.mask(layer, input_name, like) if self.dropout and self.dropout.probability else None

    def install(self, num_tokens: int) -> None:
        inputs = {
            "q_proj": "attention_input",
            "k_proj": "attention_input",
            "v_proj": "attention_input",
            "o_proj": "attention_output",
            "gate_proj": "mlp_input",
            "up_proj": "mlp_input",
        }
        for index, layer in enumerate(self.model.model.layers):
            for name in self.config.target_modules:
                owner = layer.mlp if name in ("gate_proj", "up_proj", "down_proj") else layer.self_attn
                if owner is layer.mlp and self.config.is_mixture:
                    continue
                frozen = getattr(owner, name)
                like = torch.empty(num_tokens, frozen.in_features, dtype=torch.float64)
                mask = self.mask(index, inputs.get(name, "down_input"), like)
                a, b = (self.parameters[f"{index}.{name}.{m}"] for m in "AB")
                setattr(owner, name, PlainLinear(frozen, self.config, a, b, mask))
            if self.config.is_mixture:
                layer.mlp = PlainExperts(layer.mlp, self, index)

    def run(self, microbatch: Microbatch) -> tuple[list[Tensor], dict[str, Tensor]]:
        """(log-probs a row, gradient a parameter) of Σ w·nll + auxiliary_weight · mean auxiliary loss."""
        self.install(microbatch.num_tokens)
        rows = microbatch.rows
        lengths = [len(row.tokens) for row in rows]
        blocks = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()
        mask = torch.zeros(blocks.shape, dtype=torch.float64).masked_fill(~blocks, -torch.inf)
        logits = self.model(
            input_ids=torch.cat([torch.from_numpy(row.tokens.copy()) for row in rows])[None],
            position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
            attention_mask=mask[None, None],
        ).logits[0]
        logprobs, loss = [], torch.zeros((), dtype=torch.float64)
        for row, part in zip(rows, logits.split(lengths), strict=True):
            targets = torch.from_numpy(row.targets)
            lp = F.log_softmax(part, -1)[targets - 1, torch.from_numpy(row.tokens)[targets]]
            loss = loss - (torch.from_numpy(row.weights) * lp).sum()
            logprobs.append(lp.detach())
        if self.aux:
            loss = loss + microbatch.auxiliary_weight * torch.stack(self.aux).mean()
        loss.backward()
        zero = {n: torch.zeros_like(p) for n, p in self.parameters.items()}
        return logprobs, {n: zero[n] if p.grad is None else p.grad for n, p in self.parameters.items()}
