"""Measurements of the whole, each a command: `python -m benchmarks NAME`. Never imported by the product."""
