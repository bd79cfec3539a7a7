"""What the engine's work costs, in token-equivalents: fixed by sizes, never measured.

One token-equivalent is one token forward and backward through the frozen base alone. `python -m benchmarks costs`
measures the constants; that they are the same on every machine is what makes shares mean the same everywhere.
"""

from dataclasses import dataclass

LOW_RANK = 4
"""A parameter of an adapter takes as long as this many of the base: its matrices are narrow, some are used twice."""

ROUTED = 2
"""One of an expert takes as long as so many others: its tokens are gathered, and what it made is made once more."""

MODULES = 8
"""A microbatch visits this many of its adapter's modules in the time of one token, whatever it holds."""

STEP_TOKENS = 64
"""An optimizer step updates as many parameters as this many tokens pass in the same time."""

SAVE_TOKENS = 320
"""The same for a parameter that is copied, written to a file, synced and hashed."""

SAMPLE_TOKENS = 40
"""A pass that draws one token for each sequence costs this much more than a token a sequence."""


@dataclass(frozen=True, kw_only=True)
class Prices:
    """The prices of one adapter, rounded up: nothing is free however small it is."""

    base_parameters: int
    adapter_parameters: int
    dense_parameters: int  # those that each token meets
    routed_parameters: int  # those that it meets in its top_k of num_experts experts
    modules: int  # pairs of low-rank matrices, each expert's counted

    def forward_backward(self, num_tokens: int) -> int:
        """Training on a microbatch of `num_tokens`."""
        return self._microbatch(num_tokens, 2)

    def forward(self, num_tokens: int) -> int:
        """Evaluation of a microbatch of `num_tokens`, or a prompt: half of training."""
        return self._microbatch(num_tokens, 1)

    def optim_step(self) -> int:
        """One optimizer step: this keeps tiny batches from taking the machine."""
        return self._of_adapter(STEP_TOKENS)

    def save(self) -> int:
        """One checkpoint."""
        return self._of_adapter(SAVE_TOKENS)

    def sample(self, num_tokens: int, *, num_sequences: int) -> int:
        """Drawing `num_tokens` of one sequence while so many sequences advance together."""
        return self._tokens(num_tokens * (num_sequences + SAMPLE_TOKENS), num_sequences)

    def _microbatch(self, num_tokens: int, num_halves: int) -> int:
        return self._tokens(num_tokens * num_halves, 2) + _ceil(self.modules * num_halves, 2 * MODULES)

    def _tokens(self, numerator: int, denominator: int) -> int:
        with_adapter = self.base_parameters + LOW_RANK * (self.dense_parameters + ROUTED * self.routed_parameters)
        return _ceil(numerator * with_adapter, denominator * self.base_parameters)

    def _of_adapter(self, num_tokens: int) -> int:
        return _ceil(num_tokens * self.adapter_parameters, self.base_parameters)


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
