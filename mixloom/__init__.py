"""Mixloom for its users: `Client` speaks to a server over REST. Needs no torch."""

from mixloom.client import Client
from mixloom.errors import MixloomError, ServerUnreachable

__all__ = ["Client", "MixloomError", "ServerUnreachable"]
