"""Adapters over REST: listed, downloaded whole and file by file, deleted."""

import hashlib
import io
import os
import time
import zipfile
from pathlib import Path

import pytest

from server.api import archive
from server.api.services import Services
from server.db.tables import Adapter
from server.orphans import SAFE_SECONDS, orphans
from tests.server.conftest import Caller
from tests.server.making import add_adapter, change_job, submit

pytestmark = pytest.mark.usefixtures("base")

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def job(alice: Caller) -> str:
    return str(submit(alice, name="mine", adapter={"method": "lora"})["id"])


@pytest.fixture
def adapter(job: str, services: Services) -> str:
    return add_adapter(services, job, 5, valid_loss=0.5, final=True)


def test_an_adapter_says_what_it_is_and_where_it_comes_from(alice: Caller, job: str, adapter: str) -> None:
    shown = alice.get(f"/adapters/{adapter}").json()
    assert (shown["object"], shown["name"], shown["method"]) == ("adapter", "mine", "lora")
    assert shown["source"] == {"kind": "job", "job": job, "step": 5, "final": True}
    assert (shown["base"]["name"], shown["loads_in"]) == ("tiny", ["mixloom", "peft"])
    assert alice.get("/adapters").json()["data"] == [shown]
    assert alice.get("/adapters", params={"name": "another"}).json()["data"] == []


@pytest.mark.parametrize(
    ("config", "programs"),
    [
        ({}, ["mixloom", "mixlora"]),
        ({"rslora": True}, ["mixloom", "mixlora"]),
        ({"dora": True}, ["mixloom"]),
        ({"method": "lora", "dora": True}, ["mixloom", "peft"]),
        ({"alpha": 2.5}, ["mixloom"]),
        ({"alpha": 2.0}, ["mixloom", "mixlora"]),
        ({"method": "lora", "rslora": True}, ["mixloom", "peft"]),
    ],
)
def test_a_job_says_which_programs_will_load_it(config: dict[str, object], programs: list[str], alice: Caller) -> None:
    assert submit(alice, adapter=config)["loads_in"] == programs


def test_files_are_listed_with_their_hashes(alice: Caller, adapter: str) -> None:
    files = alice.get(f"/adapters/{adapter}/files").json()["data"]
    assert [file["name"] for file in files] == ["README.md", "adapter_config.json", WEIGHTS]
    for file in files:
        answer = alice.get(f"/adapters/{adapter}/files/{file['name']}")
        assert len(answer.content) == file["bytes"]
        assert hashlib.sha256(answer.content).hexdigest() == file["sha256"]
        assert answer.headers["etag"] == f'"{file["sha256"]}"'


def test_a_file_can_be_fetched_in_parts_and_only_when_it_changed(alice: Caller, adapter: str) -> None:
    path = f"/adapters/{adapter}/files/{WEIGHTS}"
    whole = alice.get(path)
    part = alice.get(path, headers={"Range": "bytes=10-19", "If-Range": whole.headers["etag"]})
    assert (part.status_code, part.content) == (206, whole.content[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(whole.content)}"
    assert alice.get(path, headers={"Range": "bytes=10-19", "If-Range": '"other"'}).status_code == 200
    assert alice.get(path, headers={"If-None-Match": whole.headers["etag"]}).status_code == 304


@pytest.mark.parametrize(
    "name", ["nothing", "%2e%2e", "%2e%2e%2f%2e%2e%2fmixloom.db", "%2Fetc%2Fpasswd", "%00", "README.md%00"]
)
def test_a_name_that_is_no_file_of_the_adapter_is_404(name: str, alice: Caller, adapter: str) -> None:
    answer = alice.get(f"/adapters/{adapter}/files/{name}")
    assert answer.status_code == 404
    assert b"SQLite" not in answer.content


def test_the_archive_is_uncompressed_and_the_same_each_time(alice: Caller, adapter: str, services: Services) -> None:
    first = alice.get(f"/adapters/{adapter}/archive")
    assert first.headers["content-type"] == "application/zip"
    assert int(first.headers["content-length"]) == len(first.content)
    assert alice.get(f"/adapters/{adapter}/archive", params={"format": "peft"}).content == first.content
    with zipfile.ZipFile(io.BytesIO(first.content)) as archive:
        assert archive.namelist() == ["README.md", "adapter_config.json", WEIGHTS]
        for entry in archive.infolist():
            assert (entry.compress_type, entry.date_time) == (zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0))
            assert archive.read(entry) == alice.get(f"/adapters/{adapter}/files/{entry.filename}").content
    assert not [path for path in services.store.root.iterdir() if path.name.startswith("tmp")]


@pytest.mark.parametrize(
    ("config", "format"),
    [({"method": "lora"}, "mixlora"), ({}, "peft"), ({"dora": True}, "mixlora"), ({"alpha": 2.5}, "mixlora")],
)
def test_a_format_that_cannot_hold_the_adapter_is_refused(
    config: dict[str, object], format: str, alice: Caller, services: Services
) -> None:
    adapter = add_adapter(services, submit(alice, adapter=config)["id"], 1)
    answer = alice.get(f"/adapters/{adapter}/archive", params={"format": format})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "format_does_not_fit")


@pytest.mark.databases("sqlite")  # that process has none
def test_mixlora_files_are_written_by_a_process_of_their_own(alice: Caller, services: Services) -> None:
    adapter = add_adapter(services, submit(alice)["id"], 1)
    answers = [alice.get(f"/adapters/{adapter}/archive", params={"format": "mixlora"}) for _ in range(2)]
    assert answers[0].content == answers[1].content
    with zipfile.ZipFile(io.BytesIO(answers[0].content)) as archive:
        assert archive.namelist() == ["README.md", "adapter_config.json", "adapter_model.bin"]
    assert not [path for path in services.store.root.iterdir() if path.name.startswith("tmp")]


@pytest.mark.databases("sqlite")
def test_who_is_killed_in_an_export_leaves_an_orphan(
    alice: Caller, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = add_adapter(services, submit(alice)["id"], 1)
    seen: list[str] = []

    def look(source: Path, target: Path, format: str) -> None:
        os.utime(target, (time.time() - SAFE_SECONDS - 1,) * 2)
        seen.extend(orphans(services.database.read, services.store))

    monkeypatch.setattr(archive, "_export", look)
    before = set(services.store.root.iterdir())
    assert alice.get(f"/adapters/{adapter}/archive", params={"format": "mixlora"}).status_code == 200
    (left,) = seen
    assert left.startswith("exports/")
    assert set(services.store.root.iterdir()) - before == {services.store.path("exports")}
    assert services.store.children("exports") == []


@pytest.mark.parametrize("path", ["files", "archive", "archive?format=mixlora"])
def test_of_an_adapter_whose_files_are_gone_it_is_said(
    path: str, alice: Caller, services: Services, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = add_adapter(services, str(submit(alice)["id"]), 5)
    services.store.delete(f"adapters/{adapter}")
    answer = alice.get(f"/adapters/{adapter}/{path}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "file_missing")
    assert "mixloom admin doctor" in answer.json()["error"]["message"]
    assert "file_missing" in caplog.messages


def test_a_jobs_adapter_is_the_last_the_best_or_the_one_named(alice: Caller, job: str, services: Services) -> None:
    missing = alice.get(f"/jobs/{job}/adapter")
    assert (missing.status_code, missing.json()["error"]["code"]) == (409, "no_adapter_yet")
    made = {step: add_adapter(services, job, step, valid_loss=loss) for step, loss in ((1, 0.9), (2, 0.1), (3, None))}
    archives = {step: alice.get(f"/adapters/{id_}/archive").content for step, id_ in made.items()}
    assert len(set(archives.values())) == 3

    def chosen(checkpoint: str | None) -> bytes:
        return alice.get(f"/jobs/{job}/adapter", params={"checkpoint": checkpoint} if checkpoint else {}).content

    assert chosen(None) == archives[3]
    assert chosen("best") == archives[2]
    assert chosen("1") == archives[1]
    assert chosen(made[1]) == archives[1]
    for wrong in ("9", "999999999999999999999", "worst"):
        answer = alice.get(f"/jobs/{job}/adapter", params={"checkpoint": wrong})
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "checkpoint")


def test_an_ended_job_without_an_adapter_is_404(alice: Caller, job: str) -> None:
    alice.post(f"/jobs/{job}/cancel")
    answer = alice.get(f"/jobs/{job}/adapter")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_adapter")
    best = alice.get(f"/jobs/{job}/adapter", params={"checkpoint": "best"})
    assert (best.status_code, best.json()["error"]["code"]) == (404, "no_best_checkpoint")


def test_a_deleted_adapter_is_gone_and_its_job_stays(alice: Caller, job: str, adapter: str, services: Services) -> None:
    change_job(services, job, status="succeeded", adapter_id=adapter)
    assert alice.delete(f"/adapters/{adapter}").json() == {"id": adapter, "object": "adapter", "deleted": True}
    assert alice.get(f"/adapters/{adapter}").status_code == alice.delete(f"/adapters/{adapter}").status_code == 404
    assert not services.store.path(f"adapters/{adapter}").exists()
    shown = alice.get(f"/jobs/{job}").json()
    assert (shown["status"], shown["adapter_id"], shown["adapter_sha256"]) == ("succeeded", None, None)
    with services.database.read() as session:
        assert session.query(Adapter).count() == 0


def test_an_unknown_format_is_refused(alice: Caller, adapter: str) -> None:
    answer = alice.get(f"/adapters/{adapter}/archive", params={"format": "gguf"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "format")
