"""Shorthand for tests: data sets, jobs, and what a daemon would write about them."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from fastapi.testclient import TestClient
from safetensors.numpy import save, save_file

from server.adapter_files.config import disk_config
from server.adapter_files.layout import tensor_shapes
from server.api.services import Services
from server.db.tables import Adapter, Base, ExpertLoads, Job, Metric
from server.ids import new_id

Row = dict[str, Any]


def prompt_rows(count: int) -> list[Row]:
    """Rows of about equal length, each different."""
    return [{"prompt": f"What is {number:03}?", "completion": f"It is {number:03}."} for number in range(count)]


def upload(caller: TestClient, rows: list[Row], name: str = "rows.jsonl") -> str:
    """The id of a new data set."""
    content = "\n".join(json.dumps(row) for row in rows)
    answer = caller.post("/datasets", files={"file": (name, content)})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def submit(caller: TestClient, dataset: str | list[Row] | None = None, **config: Any) -> dict[str, Any]:
    """The answer to an accepted job; on a data set of 12 rows unless told otherwise."""
    answer = caller.post("/jobs", json={"dataset": dataset or upload(caller, prompt_rows(12)), **config})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def change_job(services: Services, job_id: str, **values: Any) -> None:
    """What a daemon may do to a job's row."""
    with services.database.write() as session:
        job = session.get_one(Job, job_id)
        for name, value in values.items():
            setattr(job, name, value)


def add_metric(services: Services, job_id: str, step: int, **values: Any) -> None:
    """A step that a daemon has recorded."""
    row = {
        "epoch": step / 10,
        "tokens": 100 * step,
        "train_loss": 1 / step,
        "learning_rate": 1e-4,
        "grad_norm": 1.0,
        "tokens_per_second": 200.0,
        "gang": step,
        "gang_jobs": 1,
        "created_at": time.time(),
    }
    with services.database.write() as session:
        session.add(Metric(job_id=job_id, step=step, **{**row, **values}))


def add_expert_loads(services: Services, job_id: str, step: int, loads: list[list[int]]) -> None:
    """The slots of each layer's experts, as a daemon has recorded them."""
    with services.database.write() as session:
        session.add(ExpertLoads(job_id=job_id, step=step, loads=loads))


def uploadable_adapter(adapter: dict[str, Any], base: Base) -> tuple[Row, bytes]:
    """The config and the weights, of random values, of an adapter with this resolved config."""
    draw = np.random.default_rng(0)
    shapes = tensor_shapes(adapter, base)
    return disk_config(adapter, base), save({n: draw.normal(size=s).astype(np.float32) for n, s in shapes.items()})


def add_adapter(services: Services, job_id: str, step: int, **values: Any) -> str:
    """The id of an adapter that a daemon has published for a job, with its files."""
    id_ = new_id("adp")
    with services.database.read() as session:
        adapter = session.get_one(Job, job_id).adapter
    config = {
        "peft_type": "MIXLORA" if adapter["method"] == "mixlora" else "LORA",
        "lora_alpha": adapter["alpha"],
        "lora_dropout": adapter["dropout"],
        "use_dora": adapter["dora"],
        "use_rslora": adapter["rslora"],
    }
    key = f"adapters/{id_}"

    def write(folder: Path) -> None:
        save_file({"a": np.full((4, 4), step, np.float32)}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "README.md").write_text("# An adapter\n")

    weights = services.store.put(key, write) / "adapter_model.safetensors"
    with services.database.write() as session:
        job = session.get_one(Job, job_id)
        row = {
            "tenant_id": job.tenant_id,
            "name": job.name,
            "final": False,
            "base_name": job.base_name,
            "base_hash": job.base_hash,
            "method": job.adapter["method"],
            "config": job.adapter,
            "valid_loss": None,
            "exact": True,
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
            "bytes": weights.stat().st_size,
            "created_at": time.time(),
        }
        session.add(Adapter(id=id_, key=key, job_id=job_id, step=step, **{**row, **values}))
    return id_
