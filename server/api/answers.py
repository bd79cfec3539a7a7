"""How jobs and adapters look to their tenant."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from server.db.queue import read_outlook
from server.db.results import Result, read_results
from server.db.session import Reader
from server.db.tables import Adapter, ExpertLoads, Job
from server.outlook import Outlook


def job_answers(reader: Reader, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Jobs as docs/api.md shows them."""
    if not jobs:
        return []
    outlook = read_outlook(reader, jobs)
    results = read_results(reader, jobs)
    return [_job_answer(job, outlook, results[job.id]) for job in jobs]


def _job_answer(job: Job, outlook: Outlook, result: Result) -> dict[str, Any]:
    reason = outlook.reason(job.status, job.base_hash, job.reason)
    expected = outlook.expectation(job.tenant_id, job.id, job.base_hash, reason)
    return {
        "id": job.id,
        "object": "job",
        "name": job.name,
        "status": job.status,
        "requested": job.requested,
        "base": {"name": job.base_name, "hash": job.base_hash},
        "dataset": dataset_answer(job.mixture) or job.dataset_id,
        "dataset_sha256": job.dataset_sha256,
        "mixture": job.mixture,
        "validation": job.validation,
        "init_from": job.init_from,
        "adapter": job.adapter,
        "training": job.training,
        "priority": job.priority,
        "metadata": job.labels,
        "progress": progress_answer(job),
        "queue": {
            "reason": reason,
            "sentence": outlook.sentence(reason, job.base_hash),
            "share": outlook.share(job.tenant_id, job.base_hash),
            "estimated_start": expected.start,
        },
        "estimated_finish": expected.finish,
        "metrics": result.metrics,
        "adapter_id": job.adapter_id,
        "adapter_sha256": result.adapter_sha256,
        "best_checkpoint": result.best_checkpoint,
        "loads_in": loads_in(job.adapter),
        "exact": job.exact,
        "error": job.error,
        "created_by": job.created_by,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
    }


def dataset_answer(mixture: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """The data sets of a mixture as a request names them."""
    return None if mixture is None else [{"id": part["id"], "weight": part["weight"]} for part in mixture]


def progress_answer(job: Job) -> dict[str, int]:
    """How far a job is."""
    return {
        "step": job.step,
        "total_steps": job.total_steps,
        "tokens": job.tokens,
        "total_tokens": job.total_tokens,
    }


def loads_in(config: Mapping[str, Any]) -> list[str]:
    """The programs that can use an adapter of this config: ours, and one whose files it can be made into."""
    if config["method"] == "lora":
        return ["mixloom", "peft"]
    if config["dora"] or config["alpha"] != int(config["alpha"]):
        return ["mixloom"]  # the mixlora package keeps no magnitudes, and reads only a whole alpha
    return ["mixloom", "mixlora"]


def adapter_answer(adapter: Adapter) -> dict[str, Any]:
    """An adapter, be it a finished job's, a checkpoint, or an upload."""
    return {
        "id": adapter.id,
        "object": "adapter",
        "name": adapter.name,
        "base": {"name": adapter.base_name, "hash": adapter.base_hash},
        "method": adapter.method,
        "config": adapter.config,
        "source": _source(adapter),
        "valid_loss": adapter.valid_loss,
        "exact": adapter.exact,
        "loads_in": loads_in(adapter.config),
        "sha256": adapter.sha256,
        "bytes": adapter.bytes,
        "created_at": adapter.created_at,
    }


def _source(adapter: Adapter) -> dict[str, Any]:
    if adapter.job_id is None:
        return {"kind": "upload"}
    return {"kind": "job", "job": adapter.job_id, "step": adapter.step, "final": adapter.final}


def expert_loads_answer(kept: ExpertLoads) -> dict[str, Any]:
    """How a step's tokens were spread over the experts: of each layer's slots (tokens · top_k) each expert's part."""
    slots = np.array(kept.loads)
    loads = slots / slots.sum(axis=1, keepdims=True)
    means, deviations = loads.mean(axis=1), loads.std(axis=1)
    return {
        "id": str(kept.step),
        "object": "expert_loads",
        "step": kept.step,
        "slots": int(slots[0].sum()),
        "mean": float(means.mean()),
        "std": float(deviations.mean()),
        "layers": [
            {"layer": layer, "loads": row.tolist(), "mean": float(means[layer]), "std": float(deviations[layer])}
            for layer, row in enumerate(loads)
        ],
    }
