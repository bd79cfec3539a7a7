"""A few hundred nonsensical requests, the same at every run: none of them is a mistake of ours (500)."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from server.api.schemas import Generate
from server.api.services import Services
from server.db.tables import Base
from server.job_config import AdapterConfig, JobCreate, TrainingConfig
from tests.server.conftest import Caller
from tests.server.making import add_adapter, submit

SEED = 5
NONSENSE: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**39, 0.5, -0.0, 1e308),
    *("", "a", "ds_x", "job_", "base", "best", "\u0000", "\U00010348" * 10, "x" * 5000),
    *([], [None], ["a"], [1], [[1]], {}, {"a": 1}, {"": ""}),
]
QUERIES = ["limit", "order", "after", "status", "name", "metadata[a]", "metadata[", "metadata[]", "from_step", "every"]
QUERIES += ["format", "checkpoint", "nonsense"]
TEXTS = ["", "0", "-1", "1", "9" * 30, "a", "%00", "%ff", "'", "%22", "1e5", "½", "²"]


@pytest.fixture
def chance() -> random.Random:
    return random.Random(SEED)


@pytest.fixture
def job(alice: Caller, base: Base) -> dict[str, Any]:
    return submit(alice)


def some(chance: random.Random, names: list[str], values: list[Any]) -> dict[str, Any]:
    return {name: chance.choice(values) for name in chance.sample(names, chance.randint(0, 3))}


def test_no_config_of_a_job_is_a_mistake_of_ours(alice: Caller, job: dict[str, Any], chance: random.Random) -> None:
    values = [*NONSENSE, job["dataset"], job["id"]]
    fields = [field.alias or name for name, field in JobCreate.model_fields.items()]
    statuses = set()
    for _ in range(150):
        body = {"dataset": job["dataset"], **some(chance, fields, values)}
        for part, model in (("adapter", AdapterConfig), ("training", TrainingConfig)):
            if chance.random() < 0.5:
                body[part] = some(chance, list(model.model_fields), values)
        answer = alice.post(chance.choice(["/jobs", "/jobs/estimate"]), json=body)
        assert answer.status_code < 500, body
        statuses.add(answer.status_code)
    assert statuses >= {200, 201, 422}


def test_no_prompt_is_a_mistake_of_ours(
    alice: Caller, job: dict[str, Any], chance: random.Random, publish_base: Callable[..., Base]
) -> None:
    publish_base(live=False)
    for _ in range(100):
        body = {"model": "base", "prompt": "a", **some(chance, list(Generate.model_fields), [*NONSENSE, job["id"]])}
        assert alice.post("/generate", json=body).status_code in (404, 409, 422, 503), body


def test_no_query_is_a_mistake_of_ours(
    alice: Caller, job: dict[str, Any], chance: random.Random, services: Services
) -> None:
    adapter = add_adapter(services, job["id"], 1)
    paths = ["/jobs", "/adapters", "/datasets", f"/adapters/{adapter}/archive", f"/datasets/{job['dataset']}/rows"]
    paths += [f"/jobs/{job['id']}/{part}" for part in ("events", "metrics", "checkpoints", "adapter", "experts")]
    for _ in range(150):
        address = f"{chance.choice(paths)}?{chance.choice(QUERIES)}={chance.choice(TEXTS)}"
        assert alice.get(address).status_code < 500, address
