"""What the operations of a run cost, in token-equivalents: fixed by sizes, never measured.

One token-equivalent is one token forward and backward through the frozen base alone.
"""

from dataclasses import dataclass

STEP_TOKENS = 128
"""An optimizer step updates as many parameters as this many tokens pass in the same time (docs/log.md)."""

SAVE_TOKENS = 64
"""The same for writing a parameter to a file, hashed and synced."""


@dataclass(frozen=True, kw_only=True)
class Prices:
    """The prices of one run, rounded up: nothing is free however small it is."""

    base_parameters: int
    adapter_parameters: int
    active_parameters: int  # those of the adapter that one token meets: top_k experts of num_experts

    def forward_backward(self, num_tokens: int) -> int:
        """Training on `num_tokens`."""
        return self._tokens(num_tokens, 2)

    def forward(self, num_tokens: int) -> int:
        """Evaluation of `num_tokens`: half of training."""
        return self._tokens(num_tokens, 1)

    def optim_step(self) -> int:
        """One optimizer step: this keeps tiny batches from taking the machine."""
        return self._of_adapter(STEP_TOKENS)

    def save(self) -> int:
        """One checkpoint."""
        return self._of_adapter(SAVE_TOKENS)

    def _tokens(self, num_tokens: int, num_halves: int) -> int:
        with_adapter = self.base_parameters + self.active_parameters
        return _ceil(num_tokens * num_halves * with_adapter, 2 * self.base_parameters)

    def _of_adapter(self, num_tokens: int) -> int:
        return _ceil(num_tokens * self.adapter_parameters, self.base_parameters)


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
