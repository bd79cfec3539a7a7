"""Jobs on several data sets over REST: what they take of each, what of it is reported, what is refused."""

import csv
from typing import Any

import pytest

from server.api.services import Services
from server.tokens import TokenRows
from tests.server.conftest import Caller
from tests.server.making import add_metric, prompt_rows, submit, upload

pytestmark = pytest.mark.usefixtures("base")


@pytest.fixture
def sets(alice: Caller) -> list[str]:
    """Ids of three data sets of 120, 40 and 20 rows."""
    return [upload(alice, prompt_rows(count), f"{count}.jsonl") for count in (120, 40, 20)]


def shares(sets: list[str], *weights: float) -> list[dict[str, Any]]:
    return [{"id": id_, "weight": weight} for id_, weight in zip(sets, weights, strict=True)]


def test_a_mixture_is_answered_with_what_it_takes_of_each_set(
    alice: Caller, sets: list[str], services: Services
) -> None:
    job = submit(alice, shares(sets, 1, 2, 1), validation=0.1, training={"epochs": 2})
    hashes = [alice.get(f"/datasets/{id_}").json()["sha256"] for id_ in sets]
    assert job["dataset"] == shares(sets, 1, 2, 1)
    assert job["mixture"] == [
        {
            "id": id_,
            "name": name,
            "sha256": sha256,
            "weight": weight,
            "rows": rows,
            "validation_rows": held_out,
            "epoch_rows": taken,
        }
        for id_, name, sha256, weight, rows, held_out, taken in zip(
            sets,
            ["120.jsonl", "40.jsonl", "20.jsonl"],
            hashes,
            [1, 2, 1],
            [108, 36, 18],
            [12, 4, 2],
            [41, 81, 40],
            strict=True,
        )
    ]
    assert job["name"] == "120.jsonl + 40.jsonl + 20.jsonl"
    assert job["validation"] == {"rows": 18, "fraction": 0.1}
    assert job["progress"]["total_steps"] == 2 * 21, "an epoch has as many rows as there are in all: 162"
    folder = services.store.path(f"jobs/{job['id']}")
    train, valid = (TokenRows.load(folder / f"{part}.safetensors") for part in ("train", "valid"))
    assert (len(train), len(valid)) == (162, 18)
    assert alice.get(f"/jobs/{job['id']}").json()["mixture"] == job["mixture"]


def test_without_weights_an_epoch_takes_every_row_once(alice: Caller, sets: list[str]) -> None:
    job = submit(alice, [{"id": id_} for id_ in sets], validation=0, training={"epochs": 3})
    assert [part["epoch_rows"] for part in job["mixture"]] == [120, 40, 20]
    assert job["dataset"] == shares(sets, 120, 40, 20)
    lengths = [alice.get(f"/datasets/{id_}").json()["tokens"]["total"] for id_ in sets]
    assert job["progress"]["total_tokens"] == 3 * sum(lengths)


def test_what_is_held_out_is_the_usual_part_of_each_set(alice: Caller, sets: list[str]) -> None:
    job = submit(alice, shares(sets, 1, 1, 1))
    assert [part["validation_rows"] for part in job["mixture"]] == [12, 0, 0], "a tenth where there are 100 rows"
    other = submit(alice, shares(sets[:2], 1, 1), validation=sets[2])
    assert other["validation"] == {"rows": 20, "dataset": sets[2]}
    assert [part["validation_rows"] for part in other["mixture"]] == [0, 0]


def test_a_mixture_can_be_estimated_and_cloned_and_its_answer_submitted_again(alice: Caller, sets: list[str]) -> None:
    job = submit(alice, shares(sets, 3, 1, 1), training={"max_steps": 5})
    body = {"dataset": job["dataset"], "training": {"max_steps": 5}}
    estimate = alice.post("/jobs/estimate", json=body).json()
    assert (estimate["tokens"], estimate["mixture"]) == (job["progress"]["total_tokens"], job["mixture"])
    clone = alice.post("/jobs", json={"from": job["id"], "name": "again"}).json()
    assert (clone["mixture"], clone["dataset_sha256"]) == (job["mixture"], job["dataset_sha256"])
    single = alice.post("/jobs", json={"from": job["id"], "dataset": sets[0]}).json()
    assert (single["mixture"], single["dataset"]) == (None, sets[0])


def test_a_mixture_keeps_going_when_its_sets_are_deleted(alice: Caller, sets: list[str]) -> None:
    job = submit(alice, shares(sets, 3, 1, 1))
    for id_ in sets:
        assert alice.delete(f"/datasets/{id_}").status_code == 200
    assert alice.get(f"/jobs/{job['id']}").json()["mixture"] == job["mixture"]


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"id": "ds_nothing", "weight": 1}, 404, "not_found", "dataset.1.id"),
        ({"weight": 1}, 422, "missing_field", "dataset.1.id"),
        ({"weight": 0}, 422, "invalid_request", "dataset.1.weight"),
        ({"weight": -1}, 422, "invalid_request", "dataset.1.weight"),
        ({"weight": "2"}, 422, "invalid_request", "dataset.1.weight"),
        ({"weight": None}, 422, "weights_incomplete", "dataset.1.weight"),
        ({"weight": 1e-6}, 422, "weight_too_small", "dataset.1.weight"),
        ({"wieght": 1}, 422, "unknown_field", "dataset.1.wieght"),
    ],
)
def test_a_bad_share_is_refused_by_its_place(
    change: dict[str, Any], status: int, code: str, param: str, alice: Caller, sets: list[str], services: Services
) -> None:
    second = {**({} if param == "dataset.1.id" else {"id": sets[1], "weight": 1}), **change}
    answer = alice.post("/jobs", json={"dataset": [{"id": sets[0], "weight": 1}, second]})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert services.store.list("jobs") == []


def test_a_set_twice_none_and_too_many_are_refused(alice: Caller, sets: list[str]) -> None:
    for dataset, code, param in (
        (shares([sets[0], sets[0]], 1, 2), "dataset_twice", "dataset.1.id"),
        ([], "invalid_request", "dataset"),
        ([{"id": f"ds_{n}"} for n in range(33)], "invalid_request", "dataset"),
        (sets, "invalid_request", "dataset.0"),
        ({"id": sets[0]}, "invalid_request", "dataset"),
    ):
        error = alice.post("/jobs", json={"dataset": dataset}).json()["error"]
        assert (error["code"], error["param"]) == (code, param)


def test_a_set_of_somebody_else_is_none(alice: Caller, bob: Caller, sets: list[str]) -> None:
    mine = upload(bob, prompt_rows(12))
    foreign, absent = (bob.post("/jobs", json={"dataset": shares([mine, id_], 1, 1)}) for id_ in (sets[0], "ds_absent"))
    assert foreign.status_code == absent.status_code == 404
    assert foreign.json()["error"]["message"].replace(sets[0], "ds_absent") == absent.json()["error"]["message"]


def test_rows_that_do_not_fit_are_named_with_their_set(alice: Caller, sets: list[str]) -> None:
    long = upload(alice, [*prompt_rows(3), {"prompt": "a", "completion": "long " * 20}])
    body = {"dataset": shares([sets[0], long], 1, 1), "training": {"cutoff_length": 70}}
    error = alice.post("/jobs", json=body).json()["error"]
    assert (error["code"], error["param"], error["details"][0]["line"]) == ("row_too_long", "dataset.1", 4)
    body["training"]["long_rows"] = "skip"
    job = alice.post("/jobs", json=body).json()
    warnings = [one for one in alice.get(f"/jobs/{job['id']}/events").json()["data"] if one["kind"] == "warning"]
    assert warnings[0]["message"].startswith("'dataset.1': 1 rows are left out")
    one_row = upload(alice, prompt_rows(1))
    error = alice.post("/jobs", json={"dataset": shares([sets[0], one_row], 1, 1), "validation": 0.2}).json()["error"]
    assert (error["code"], one_row in error["message"]) == ("too_few_rows", True)


def test_losses_of_each_set_are_columns_of_the_metrics(alice: Caller, sets: list[str], services: Services) -> None:
    job = submit(alice, shares(sets[:2], 1, 1), validation=0.1)["id"]
    add_metric(services, job, 1, train_losses=[0.5, None])
    add_metric(services, job, 2, train_losses=[0.25, 0.75], valid_loss=0.5, valid_losses=[0.4, 0.6])
    names = [f"{loss}.{id_}" for loss in ("train_loss", "valid_loss") for id_ in sets[:2]]
    table = alice.get(f"/jobs/{job}/metrics").json()
    assert table["columns"][-4:] == names
    assert [row[-4:] for row in table["rows"]] == [[0.5, None, None, None], [0.25, 0.75, 0.4, 0.6]]
    text = alice.get(f"/jobs/{job}/metrics", params={"format": "csv"}).text
    lines = list(csv.DictReader(text.splitlines()))
    assert [lines[0][name] for name in names] == ["0.5", "", "", ""]
    latest = alice.get(f"/jobs/{job}").json()["metrics"]
    assert [latest[name] for name in names] == [0.25, 0.75, 0.4, 0.6]
    assert (latest["step"], latest["valid_loss"]) == (2, 0.5)


def test_only_losses_that_are_measured_have_columns(alice: Caller, sets: list[str], services: Services) -> None:
    mixed = submit(alice, shares(sets[:2], 1, 1), validation=sets[2])["id"]
    single = submit(alice, sets[0])["id"]
    for job in (mixed, single):
        add_metric(services, job, 1, train_losses=[0.5, 0.5] if job == mixed else None)
    columns = {job: alice.get(f"/jobs/{job}/metrics").json()["columns"] for job in (mixed, single)}
    assert columns[mixed] == [*columns[single], f"train_loss.{sets[0]}", f"train_loss.{sets[1]}"]
    listed = alice.get("/jobs", params={"order": "asc"}).json()["data"]
    assert [list(job["metrics"]) for job in listed] == [columns[mixed], columns[single]]
