"""Errors that mean that memory ran out, whoever raised them. Knows no pass and no run."""

import re

import torch

_ASKED = re.compile(r"allocate ([\d.]+) ?(bytes|[KMGTPE]iB)", re.IGNORECASE)
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "pib": 2**50, "eib": 2**60}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch (CPU or CUDA), numpy or Python asked for more memory than there is."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def bytes_asked(error: BaseException) -> int | None:
    """How much the request was for that failed, where the error says so."""
    found = _ASKED.search(str(error))
    return None if found is None else round(float(found[1]) * _UNITS[found[2].lower()])
