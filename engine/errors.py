"""What a caller of the engine can get wrong."""


class EngineError(ValueError):
    """The rule, the value, and what to do."""


class UnsupportedBase(EngineError):
    """A base model that the engine cannot train adapters on."""
