"""The base of every schema that a client fills in."""

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """Refuses what it does not know, and does not bend types (`"8"` is no number, `true` is no 1)."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
