"""A backup is a data directory: made in mid-run, again made from what it has, and gone on from elsewhere."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.base_model import BaseModel
from server import doctor
from server.api.app import open_services
from server.api.services import Services
from server.backup import back_up, restore
from server.errors import MixloomError
from server.settings import Settings
from tests.server.conftest import ADMIN_KEY, Caller
from tests.server.daemon.conftest import MIXTURE, PLAIN, Life, final_hash, job, steps, submit

pytestmark = pytest.mark.databases("sqlite")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return tmp_path / "backup"


def test_the_original_is_destroyed_and_elsewhere_each_job_ends_with_the_bytes_it_would_have_had(
    life: Life, alice: Caller, services: Services, copy: Path, frozen: BaseModel, folder: Path
) -> None:
    undisturbed = []
    for adapter in (MIXTURE, PLAIN):
        id_ = submit(alice, adapter)
        life.finish()
        undisturbed.append(final_hash(services, id_))
    ids = [submit(alice, adapter) for adapter in (MIXTURE, PLAIN)]
    life.turn_until(lambda: min(job(services, id_).step for id_ in ids) == 6)
    first = back_up(services.settings, copy)
    assert first.new == first.folders > 0
    life.turn_until(lambda: min(job(services, id_).step for id_ in ids) == 11)
    second = back_up(services.settings, copy)
    assert 0 < second.new < second.folders
    assert first.findings == second.findings == []
    life.finish()  # what the original does after that is in no backup
    shutil.rmtree(services.settings.data_dir)

    elsewhere = Settings(data_dir=copy.with_name("elsewhere"), admin_key=ADMIN_KEY)
    assert restore(elsewhere, copy).findings == []
    restored = open_services(elsewhere)
    assert [job(restored, id_).step for id_ in ids] == [11, 11]
    Life(restored, frozen, folder).finish()
    assert [final_hash(restored, id_) for id_ in ids] == undisturbed
    assert [steps(restored, id_) for id_ in ids] == [list(range(1, 13))] * 2
    assert doctor.examine(restored.database, restored.store) == []


def test_what_is_gone_from_the_original_goes_from_the_backup_and_what_is_damaged_is_named(
    life: Life, alice: Caller, services: Services, copy: Path
) -> None:
    gone, kept = submit(alice, PLAIN, steps=2), submit(alice, PLAIN, steps=2)
    life.finish()
    back_up(services.settings, copy)
    assert alice.delete(f"/jobs/{gone}").status_code == 200
    adapter = services.store.path(services.store.list("adapters")[0]) / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-1] + b"x")
    shutil.rmtree(copy / "adapters")
    again = back_up(services.settings, copy)
    assert (again.new, again.removed) == (1, 1), "the adapter; the job's rows"
    assert [finding.kind for finding in again.findings] == ["adapter_damaged"]
    shutil.rmtree(services.store.path(f"jobs/{kept}"))
    assert {finding.kind for finding in back_up(services.settings, copy).findings} == {"adapter_damaged"}
    shutil.rmtree(copy / "jobs")
    found = back_up(services.settings, copy).findings
    assert {finding.kind for finding in found} == {"adapter_damaged", "tokens_missing"}


def nowhere(settings: Settings, folder: Path) -> None:
    restore(settings.model_copy(update={"data_dir": folder / "new"}), folder / "nothing")


def into_what_is_there(settings: Settings, folder: Path) -> None:
    restore(settings, folder)


def over_something_else(settings: Settings, folder: Path) -> None:
    (folder / "letters").mkdir(parents=True)
    back_up(settings, folder)


def of_postgresql(settings: Settings, folder: Path) -> None:
    back_up(settings.model_copy(update={"database_url": "postgresql://me@host/tables"}), folder)


@pytest.mark.parametrize(
    ("wish", "code", "says"),
    [
        (nowhere, "no_database", "nothing"),
        (into_what_is_there, "data_dir_not_empty", "Move what is in it away"),
        (over_something_else, "not_a_backup", "is not empty"),
        (of_postgresql, "not_sqlite", "pg_dump"),
    ],
)
def test_what_cannot_be_copied_is_refused_with_what_to_do(
    wish: Callable[[Settings, Path], None], code: str, says: str, services: Services, copy: Path
) -> None:
    with pytest.raises(MixloomError, match=says) as caught:
        wish(services.settings, copy)
    assert caught.value.code == code
