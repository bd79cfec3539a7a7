"""Identifiers: a prefix that names the noun and 128 random bits."""

import secrets


def new_id(prefix: str) -> str:
    """A fresh id such as `job_5f0c…` (32 hex digits)."""
    return f"{prefix}_{secrets.token_hex(16)}"
