"""Tensors: one frozen base model and the adapters in training on it. Knows no HTTP, SQL, tenants or queues."""

from engine import mkl

mkl.keep_bits()
