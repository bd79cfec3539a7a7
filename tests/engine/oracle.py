"""The plain per-job loop that every packed operation must equal.

Unmodified transformers, one microbatch at a time, sdpa attention (which stays in float64, unlike eager) under a
block-diagonal mask, experts token by token, frozen projections once an expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.adapter import Adapter
from engine.dropout import Masks
from engine.random import DropoutKey
from engine.run import Microbatch
from tests.models import tiny_model


def adapted(frozen: nn.Linear, scaling: float, parameters: dict[str, Tensor], x: Tensor, dropped: Tensor) -> Tensor:
    """Wx + s·BA d(x); DoRA scales it, but for the bias, by m/‖W + s·BA‖ with the norm of the matrix itself."""
    a, b = parameters["A"], parameters["B"]
    y = x @ frozen.weight.T + scaling * (dropped @ a.T @ b.T)
    if "m" in parameters:
        norm = (frozen.weight + scaling * (b @ a)).norm(dim=1).detach()
        y = parameters["m"] / norm * y
    return y if frozen.bias is None else y + frozen.bias


class PlainLinear(nn.Module):
    """One frozen linear module with its adapter."""

    def __init__(self, frozen: nn.Linear, scaling: float, parameters: dict[str, Tensor], mask: Tensor | None):
        super().__init__()
        self.frozen, self.scaling, self.parameters_of, self.mask = frozen, scaling, parameters, mask

    def forward(self, x: Tensor) -> Tensor:
        return adapted(self.frozen, self.scaling, self.parameters_of, x, x if self.mask is None else x * self.mask)


class PlainExperts(nn.Module):
    """Paper eq. 5 to 7 as written: each token through each of its experts, W2 included."""

    def __init__(self, mlp: nn.Module, oracle: "Oracle", layer: int):
        super().__init__()
        self.mlp, self.oracle, self.layer = mlp, oracle, layer

    def linear(self, module: str, expert: int, x: Tensor, dropped: Tensor) -> Tensor:
        frozen = getattr(self.mlp, module)
        if module not in self.oracle.config.target_modules:
            return frozen(x)
        parameters = self.oracle.of(f"{self.layer}.{module}.{expert}")
        return adapted(frozen, self.oracle.config.scaling, parameters, x, dropped)

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
            for k, (expert, weight) in enumerate(chosen):
                gate = self.linear("gate_proj", expert, row, dropped)
                up = self.linear("up_proj", expert, row, dropped)
                hidden = self.mlp.act_fn(gate) * up
                mask = oracle.mask_of_expert(self.layer, expert, rows_of[expert], token, k, hidden)
                inner = hidden if mask is None else hidden * mask
                output = output + weight * self.linear("down_proj", expert, hidden, inner)
            outputs.append(output)
        return torch.stack(outputs)[None]


class Oracle:
    """One job's microbatch, forward and gradients, by itself."""

    def __init__(self, adapter: Adapter, dropout: DropoutKey | Masks | None, model_type: str = "llama"):
        """`dropout`: as a CPU draws it, or as a GPU does."""
        self.config = adapter.config
        self.dropout = dropout
        self.parameters = {n: p.detach().clone().requires_grad_() for n, p in adapter.named()}
        self.aux: list[Tensor] = []
        self.model = tiny_model(model_type, torch.float64)
        self.model.set_attn_implementation("sdpa")

    def mask(self, layer: int, input_name: str, like: Tensor) -> Tensor | None:
        if self.dropout is None:
            return None
        if isinstance(self.dropout, Masks):
            kept = 1 - self.dropout.of_input(layer, input_name, like).double()
        else:
            drops = self.dropout.dropped(layer, {input_name: like.numel()})
            kept = torch.ones(like.numel(), dtype=torch.float64).index_fill(0, drops, 0)
        return kept.view(like.shape) / (1 - self.dropout.probability)

    def mask_of_expert(
        self, layer: int, expert: int, tokens: list[int], token: int, k: int, hidden: Tensor
    ) -> Tensor | None:
        """Of the input of an expert's down, the token's k-th; `tokens` are all that the expert has."""
        if isinstance(self.dropout, Masks):
            like = hidden.new_empty(self.dropout.sizes[0], self.config.top_k * len(hidden))
            mask = self.mask(layer, "down_input", like)
            return mask.view(len(mask), self.config.top_k, -1)[token, k]
        mask = self.mask(layer, f"down_input.{expert}", hidden.new_empty(len(tokens), len(hidden)))
        return None if mask is None else mask[tokens.index(token)]

    def of(self, place: str) -> dict[str, Tensor]:
        """The parameters A, B and, with DoRA, m of `layer.module[.expert]`."""
        names = {matrix: f"{place}.{matrix}" for matrix in ("A", "B", "m")}
        return {matrix: self.parameters[name] for matrix, name in names.items() if name in self.parameters}

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
                setattr(owner, name, PlainLinear(frozen, self.config.scaling, self.of(f"{index}.{name}"), mask))
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
