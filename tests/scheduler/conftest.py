"""How Hypothesis searches: fully by default; for a mutant, the first example that fails is enough."""

from hypothesis import Phase, settings

settings.register_profile("mutants", phases=[Phase.generate], database=None, derandomize=True, print_blob=False)
