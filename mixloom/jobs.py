"""Jobs, as `client.jobs`."""

import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mixloom.adapters import save_archive
from mixloom.errors import MixloomError
from mixloom.transport import PAGE, Object, Objects, Transport, given

ENDED = frozenset({"succeeded", "failed", "cancelled"})
POLL_SECONDS = 1.0


class Jobs:
    """Submit, follow and steer jobs. `job` is an id everywhere; `find` takes the other ways to name one."""

    def __init__(self, transport: Transport):
        self._transport = transport

    def submit(self, config: Object | None = None, *, idempotency_key: str | None = None, **fields: Any) -> Object:
        """The job made of the JSON that `POST /jobs` takes; `fields` win over `config`.

        `client.jobs.submit(dataset="ds_…", adapter={"rank": 8}, training={"epochs": 1})`

        It is sent again when the connection breaks, with the same key, so that there is one job. A key of your own
        makes it one job over restarts of your program too, for 24 hours.
        """
        key = idempotency_key or secrets.token_hex(16)
        return self._transport.post_once("/jobs", {**(config or {}), **fields}, key)

    def clone(self, job: str, **changes: Any) -> Object:
        """A new job like another one of yours, but for the changes."""
        return self.submit({"from": job}, **changes)

    def estimate(self, config: Object | None = None, **fields: Any) -> Object:
        """What `submit` would make: tokens, steps, seconds, bytes, the resolved config. Nothing is made."""
        return self._transport.post("/jobs/estimate", {**(config or {}), **fields})

    def iterate(self, *, status: str | None = None, name: str | None = None, order: str = "desc") -> Iterator[Object]:
        """Every job of yours, page after page."""
        return self._transport.pages("/jobs", status=status, name=name, order=order)

    def list(self, limit: int = 20, *, status: str | None = None, name: str | None = None) -> Objects:
        """Your newest jobs."""
        return list(self._transport.pages("/jobs", limit=limit, status=status, name=name))

    def get(self, job: str) -> Object:
        return self._transport.get(f"/jobs/{job}")

    def find(self, reference: str) -> Object:
        """The one job with this id, this name, or an id that begins so.

        Raises `MixloomError` `ambiguous_job` when there are several, `not_found` when there is none.
        """
        named = self.list(limit=PAGE, name=reference)
        prefix = reference if reference.startswith("job_") else f"job_{reference}"
        found = named or [job for job in self.iterate() if job["id"].startswith(prefix)]
        if len(found) == 1:
            return found[0]
        if found:
            ids = ", ".join(job["id"] for job in found[:5])
            raise MixloomError(
                f"More than one job is called '{reference}': {ids}. Give the id of the one that you mean.",
                code="ambiguous_job",
                status=400,
            )
        raise MixloomError(
            f"You have no job '{reference}'. List yours with `mixloom jobs`.", code="not_found", status=404
        )

    def cancel(self, job: str) -> Object:
        """Final in the answer."""
        return self._transport.post(f"/jobs/{job}/cancel")

    def pause(self, job: str) -> Object:
        """The answer shows `requested: pause` until the job's state is saved."""
        return self._transport.post(f"/jobs/{job}/pause")

    def resume(self, job: str) -> Object:
        return self._transport.post(f"/jobs/{job}/resume")

    def delete(self, job: str) -> Object:
        """An ended job, with its metrics, checkpoints and adapter."""
        return self._transport.delete(f"/jobs/{job}")

    def events(self, job: str, *, after: str | None = None, limit: int | None = None) -> Iterator[Object]:
        """What happened to it, oldest first, from behind the event `after` on."""
        return self._transport.pages(f"/jobs/{job}/events", order="asc", after=after, limit=limit)

    def metrics(self, job: str, *, from_step: int | None = None, every: int | None = None) -> Objects:
        """One dict a step: `{"step", "train_loss", "valid_loss", "learning_rate", …}`."""
        table = self._transport.get(f"/jobs/{job}/metrics", given(from_step=from_step, every=every))
        return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]

    def experts(self, job: str, *, limit: int | None = None, order: str = "asc") -> Iterator[Object]:
        """How the tokens of the last step, and of each tenth before it, were spread over a MixLoRA job's experts.

        `{"step", "slots", "mean", "std", "layers": [{"loads": [part of the slots, …], "mean", "std"}, …]}`
        """
        return self._transport.pages(f"/jobs/{job}/experts", order=order, limit=limit)

    def checkpoints(self, job: str) -> Objects:
        """Its adapters, step by step; each can be used in `generate` and downloaded."""
        return list(self._transport.pages(f"/jobs/{job}/checkpoints"))

    def watch(self, jobs: Iterable[str], *, seconds: float = POLL_SECONDS) -> Iterator[Objects]:
        """All the jobs as they are now, again and again; the last time when every one has ended."""
        ids = [jobs] if isinstance(jobs, str) else list(jobs)
        latest: dict[str, Object] = {}
        while True:
            for id_ in ids:
                if id_ not in latest or latest[id_]["status"] not in ENDED:
                    latest[id_] = self.get(id_)
            yield [latest[id_] for id_ in ids]
            if all(job["status"] in ENDED for job in latest.values()):
                return
            time.sleep(seconds)

    def wait(self, job: str, *, seconds: float = POLL_SECONDS) -> Object:
        """The job once it has ended; its `status` says how."""
        (ended,) = list(self.watch([job], seconds=seconds))[-1]
        return ended

    def download_adapter(
        self,
        job: str,
        path: str | Path | None = None,
        *,
        format: str | None = None,
        checkpoint: str | int | None = None,
    ) -> Path:
        """Save its adapter as a zip: `format` native, peft or mixlora; `checkpoint` a step, or "best"."""
        return save_archive(
            self._transport, f"/jobs/{job}/adapter", job, path, {"format": format, "checkpoint": checkpoint}
        )
