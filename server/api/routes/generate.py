"""Asking a model. The request waits for the daemon without holding a thread, so that many can."""

import asyncio
from typing import Any

from starlette.concurrency import run_in_threadpool

from server.api import generation, schemas
from server.api.deps import ServicesDep, TenantDep
from server.api.routing import new_router
from server.errors import MixloomError

router = new_router(tag="generate")


@router.post("/generate")
async def generate(services: ServicesDep, tenant: TenantDep, body: schemas.Generate) -> dict[str, Any]:
    """An answer of the base, or of one of your adapters on it."""
    asked = await run_in_threadpool(generation.ask, services, tenant, body)
    try:
        async with asyncio.timeout(generation.DEADLINE_SECONDS):
            operation = await services.operations.wait(asked.operation_id)
    except TimeoutError:
        error = MixloomError(
            "generation_timed_out",
            f"There was no answer after {generation.DEADLINE_SECONDS:.0f} seconds. Ask for fewer tokens.",
            504,
        )
        await run_in_threadpool(generation.give_up, services, asked, error)
        raise error from None
    except MixloomError as error:
        await run_in_threadpool(generation.give_up, services, asked, error)
        raise
    return await run_in_threadpool(generation.answer, services, asked, operation)
