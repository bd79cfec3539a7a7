"""Bodies of requests that need no more than their shape checked. A job's config is `server.job_config`."""

from typing import Annotated, Literal

from pydantic import Field

from server.strict import StrictModel

Name = Annotated[str, Field(min_length=1, max_length=200)]
Share = Annotated[float, Field(gt=0, le=1000)]


class TenantCreate(StrictModel):
    name: Name
    share: Share = 1.0


class TenantUpdate(StrictModel):
    name: Name | None = None
    share: Share | None = None


class KeyCreate(StrictModel):
    name: Name = "key"


class DrainCreate(StrictModel):
    mode: Literal["quick", "graceful", "fast"] = "quick"
    deadline_seconds: Annotated[float, Field(gt=0, le=30 * 86400)] | None = None
    reason: Annotated[str, Field(max_length=500)] = ""
    daemon: str | None = None
    exit: bool = False
