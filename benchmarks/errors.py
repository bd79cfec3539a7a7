"""What the user of a benchmark can cause."""


class BenchmarkError(ValueError):
    """One sentence for the person who started it."""
