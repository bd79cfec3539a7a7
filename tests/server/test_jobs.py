"""Jobs over REST: submitted, shown, listed, cloned."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from server.api.services import Services
from server.db.tables import Base, Run
from server.job_config import AdapterConfig, JobCreate, TrainingConfig
from server.tokens import TokenRows
from tests.server.conftest import TARGETS, Caller
from tests.server.making import change_job, prompt_rows, submit, upload

pytestmark = pytest.mark.usefixtures("base")


ANSWER = {
    *("id", "object", "name", "status", "requested", "base", "dataset", "dataset_sha256", "mixture", "validation"),
    *("adapter", "init_from", "training", "priority", "metadata", "progress", "queue", "estimated_finish", "metrics"),
    *("adapter_id", "adapter_sha256", "best_checkpoint", "loads_in", "exact", "error", "created_by", "created_at"),
    *("started_at", "finished_at"),
}


def test_a_job_is_answered_with_everything_resolved(alice: Caller, base: Base) -> None:
    answer = alice.post("/jobs", json={"dataset": upload(alice, prompt_rows(120), "mine.jsonl")})
    job = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert set(job) == ANSWER
    assert job["id"].startswith("job_")
    assert (job["object"], job["name"], job["status"]) == ("job", "mine.jsonl", "queued")
    assert job["base"] == {"name": "tiny", "hash": base.hash}
    assert job["validation"] == {"rows": 12, "fraction": 0.1}
    assert (job["training"]["batch_size"], job["training"]["epochs"]) == (8, 8)
    assert job["progress"] == {
        "step": 0,
        "total_steps": 112,
        "tokens": 0,
        "total_tokens": job["progress"]["total_tokens"],
    }
    assert job["loads_in"] == ["mixloom", "mixlora"]
    assert alice.get(answer.headers["location"]).json()["id"] == job["id"]


def test_an_accepted_job_keeps_its_own_tokens_and_a_run(alice: Caller, services: Services) -> None:
    dataset = upload(alice, prompt_rows(120))
    job = submit(alice, dataset, training={"max_steps": 15})
    folder = services.store.path(f"jobs/{job['id']}")
    train, valid = (TokenRows.load(folder / f"{name}.safetensors") for name in ("train", "valid"))
    assert (len(train), len(valid)) == (108, 12)
    lengths = sorted([*train.lengths, *valid.lengths])
    assert sum(lengths) == alice.get(f"/datasets/{dataset}").json()["tokens"]["total"]
    with services.database.read() as session:
        run = session.query(Run).one()
    assert (run.job_id, run.tenant_id, run.lease_epoch, run.cost_charged) == (job["id"], alice.tenant_id, None, 0)
    assert alice.delete(f"/datasets/{dataset}").status_code == 200
    assert alice.get(f"/jobs/{job['id']}").status_code == 200


def test_without_validation_there_is_no_file_for_it(alice: Caller, services: Services) -> None:
    job = submit(alice)
    assert job["validation"] == {"rows": 0, "fraction": 0.0}
    assert not (services.store.path(f"jobs/{job['id']}") / "valid.safetensors").exists()


def test_total_tokens_are_those_of_the_steps(alice: Caller, services: Services) -> None:
    job = submit(alice, training={"epochs": 3, "batch_size": 4})
    rows = TokenRows.load(services.store.path(f"jobs/{job['id']}") / "train.safetensors")
    assert job["progress"]["total_steps"] == 9
    assert job["progress"]["total_tokens"] == 3 * rows.lengths.sum()


def test_a_data_set_can_be_the_validation(alice: Caller, services: Services) -> None:
    other = upload(alice, prompt_rows(5))
    job = submit(alice, validation=other)
    assert job["validation"] == {"rows": 5, "dataset": other}
    assert job["training"]["evaluate_every"] == 2
    assert len(TokenRows.load(services.store.path(f"jobs/{job['id']}") / "valid.safetensors")) == 5


def test_jobs_are_numbered_in_the_order_of_their_submission(alice: Caller, bob: Caller) -> None:
    jobs = [submit(caller)["id"] for caller in (alice, bob, alice)]
    listed = alice.get("/jobs", params={"order": "asc"}).json()["data"]
    assert [job["id"] for job in listed] == [jobs[0], jobs[2]]


FIELDS: dict[str, Any] = {
    "name": "another",
    "base": "nobody's",
    "dataset": "ds_1",
    "validation": 0.25,
    "init_from": "adp_1",
    "preset": "paper",
    "priority": "high",
    "metadata": {"team": "blue"},
    "from": "job_unknown",
    "adapter.method": "lora",
    "adapter.dora": True,
    "adapter.rslora": True,
    "adapter.rank": 4,
    "adapter.alpha": 5,
    "adapter.dropout": 0.5,
    "adapter.target_modules": ["up_proj"],
    "adapter.num_experts": 3,
    "adapter.top_k": 1,
    "adapter.router_aux_loss_coef": 0.5,
    "training.epochs": 3,
    "training.max_steps": 5,
    "training.batch_size": 3,
    "training.learning_rate": 1e-3,
    "training.loraplus_ratio": 16,
    "training.schedule": "cosine",
    "training.warmup_ratio": 0.5,
    "training.weight_decay": 0.1,
    "training.max_grad_norm": 2.0,
    "training.cutoff_length": 100,
    "training.long_rows": "skip",
    "training.supervise": "all",
    "training.seed": 7,
    "training.evaluate_every": 3,
    "training.checkpoint_every": 3,
    "training.keep_checkpoints": 7,
    "training.early_stopping": {"patience": 2},
}
REFUSED = {"base": "unknown_base", "from": "not_found", "dataset": "not_found", "init_from": "not_found"}
NOT_YET = {"training.early_stopping"}


def fields_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        parts = {"adapter": AdapterConfig, "training": TrainingConfig}
        if not prefix and name in parts:
            yield from fields_of(parts[name], f"{name}.")
        else:
            yield prefix + (field.alias or name)


def test_the_fields_tried_here_are_those_of_the_schema() -> None:
    assert set(FIELDS) == set(fields_of(JobCreate))


@pytest.mark.databases("sqlite")  # what the schema takes is no database's affair
@pytest.mark.parametrize("field", FIELDS)
def test_every_field_has_an_effect_or_is_refused(field: str, alice: Caller) -> None:
    dataset = upload(alice, prompt_rows(110))
    whole: dict[str, Any] = {"dataset": dataset, "adapter": {}, "training": {}}
    usual = submit(alice, **whole)
    place = whole
    *parts, name = field.split(".")
    for part in parts:
        place = place[part]
    place[name] = FIELDS[field]
    answer = alice.post("/jobs", json=whole)
    if field in NOT_YET or field in REFUSED:
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == (REFUSED.get(field, "not_supported_yet"), field)
        return
    assert answer.status_code == 201, answer.text
    changed = {key for key in ANSWER if answer.json()[key] != usual[key]} - {"id", "created_at"}
    assert changed - {"progress", "queue"} or field == "dataset"
    if parts:
        assert answer.json()[parts[0]][name] == FIELDS[field]


def test_a_job_with_targets_of_its_own_keeps_their_order(alice: Caller) -> None:
    targets = list(reversed(TARGETS))
    assert submit(alice, adapter={"target_modules": targets})["adapter"]["target_modules"] == targets


def test_an_estimate_says_what_a_job_would_be_and_keeps_nothing(
    alice: Caller, services: Services, publish_base: Callable[..., Base]
) -> None:
    body = {
        "dataset": upload(alice, prompt_rows(12)),
        "adapter": {"method": "lora", "rank": 2, "target_modules": ["q_proj"]},
    }
    estimate = alice.post("/jobs/estimate", json=body).json()
    assert (estimate["object"], estimate["steps"], estimate["rows"], estimate["seconds"]) == ("estimate", 20, 12, None)
    assert estimate["parameters"] == 2 * 2 * 128
    of_the_base = 5000 + 2000
    assert of_the_base < estimate["bytes"].pop("token_of_a_pass") < 2 * of_the_base
    assert estimate["bytes"] == {"adapter": 4 * 512, "recovery_point": 12 * 512, "memory": 16 * 512}
    assert alice.get("/jobs").json()["data"] == []
    assert services.store.list("jobs") == []
    publish_base(detail={"tokens_per_second": 50.0})
    assert alice.post("/jobs/estimate", json=body).json()["seconds"] == estimate["tokens"] / 50


def test_a_mixtures_token_takes_more_memory_than_one_of_lora(alice: Caller) -> None:
    taken = {}
    for method in ("lora", "mixlora"):
        body = {"dataset": upload(alice, prompt_rows(12)), "adapter": {"method": method, "rank": 2}}
        taken[method] = alice.post("/jobs/estimate", json=body).json()["bytes"]["token_of_a_pass"]
    assert taken["mixlora"] > taken["lora"]


def test_a_clone_is_the_job_it_starts_from_with_changes(alice: Caller, bob: Caller) -> None:
    first = submit(alice, name="first", adapter={"rank": 4}, training={"epochs": 2}, metadata={"a": "b"})
    answer = alice.post("/jobs", json={"from": first["id"], "training": {"max_steps": 3}})
    clone = answer.json()
    assert answer.status_code == 201
    assert (clone["name"], clone["metadata"], clone["dataset"]) == ("first", {"a": "b"}, first["dataset"])
    assert clone["adapter"] == first["adapter"]
    assert (clone["training"]["epochs"], clone["training"]["max_steps"]) == (None, 3)
    foreign = bob.post("/jobs", json={"from": first["id"]})
    assert (foreign.status_code, foreign.json()["error"]["param"]) == (404, "from")


def test_lists_can_be_filtered(alice: Caller, services: Services) -> None:
    dataset = upload(alice, prompt_rows(12))
    blue = submit(alice, dataset, name="one", metadata={"team": "blue", "run.1": "x"})["id"]
    red = submit(alice, dataset, name="two", metadata={"team": "red"})["id"]
    change_job(services, red, status="succeeded")

    def ids(**params: str) -> list[str]:
        return [job["id"] for job in alice.get("/jobs", params=params).json()["data"]]

    assert ids(name="one") == ids(status="queued") == ids(**{"metadata[team]": "blue"}) == [blue]
    assert ids(**{"metadata[team]": "blue", "metadata[run.1]": "x"}) == [blue]
    assert ids(**{"metadata[team]": "blue", "metadata[run.1]": "y"}) == []
    assert ids() == [red, blue]


@pytest.mark.parametrize(
    ("params", "code"),
    [
        ({"status": "sleeping"}, "invalid_request"),
        ({"statuss": "queued"}, "unknown_parameter"),
        ({'metadata["]': "x"}, "invalid_request"),
        ({"limit": "0"}, "invalid_request"),
        ({"limit": "101"}, "invalid_request"),
        ({"order": "up"}, "invalid_request"),
    ],
)
def test_bad_parameters_of_a_list_are_refused(params: dict[str, str], code: str, alice: Caller) -> None:
    answer = alice.get("/jobs", params=params)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, code)


def test_a_job_never_shows_what_is_in_its_rows(alice: Caller) -> None:
    rows = prompt_rows(12)
    rows[0]["prompt"] = "a canary sings"
    job = submit(alice, upload(alice, rows))
    assert "canary" not in json.dumps(job)
