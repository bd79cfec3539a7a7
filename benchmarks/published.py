"""The MixLoRA paper's own figures (arXiv 2404.15159, appendix A.4), measured there on one GPU."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Figures:
    """Of one row of a table: latencies in microseconds a token, peak memory in GB a model."""

    forward: float
    backward: float
    training_memory: float
    inference: float
    inference_memory: float


@dataclass(frozen=True)
class PublishedTable:
    base: str
    rows: dict[tuple[str, int], Figures]
    """By contender and number of models. The daggered rows are those with W1 and W3 shared."""


TABLES = {
    6: PublishedTable(
        "LLaMA-2 7B",
        {
            ("lora", 1): Figures(245.3, 552.3, 15.2, 241.4, 13.7),
            ("dora", 1): Figures(659.4, 1193.8, 15.6, 645.3, 13.7),
            ("mixlora_unshared", 1): Figures(535.2, 1187.5, 15.1, 532.8, 13.7),
            ("mixlora_w1_w3", 1): Figures(462.5, 1097.6, 15.1, 442.2, 13.7),
            ("mixlora_unshared", 2): Figures(533.9, 1185.5, 8.8, 523.8, 7.2),
            ("mixlora_w1_w3", 2): Figures(441.0, 1072.3, 8.8, 441.4, 7.2),
        },
    ),
    7: PublishedTable(
        "Gemma 2B",
        {
            ("lora", 1): Figures(151.1, 308.2, 11.4, 152.0, 10.6),
            ("dora", 1): Figures(539.4, 919.9, 11.4, 533.4, 10.6),
            ("mixlora_unshared", 1): Figures(250.6, 527.2, 11.2, 245.1, 10.5),
            ("mixlora_w1_w3", 1): Figures(226.5, 525.2, 11.2, 224.0, 10.5),
            ("mixlora_unshared", 2): Figures(249.6, 524.0, 7.6, 243.1, 6.5),
            ("mixlora_w1_w3", 2): Figures(223.8, 523.7, 7.6, 221.2, 6.5),
        },
    ),
}
