"""A backup made in mid-run: the original is destroyed, and elsewhere each job ends with the bytes it would have had."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from server.faults import Fault, arm
from tests.e2e.command_line import mixloom
from tests.e2e.conftest import NewServer
from tests.e2e.making import MIXTURE, PLAIN, dataset, submit
from tests.e2e.server import ADMIN_KEY, Server, wait_for

pytestmark = pytest.mark.slow

STEPS = 60


def admin(server: Server, *arguments: str) -> dict[str, object]:
    """What `mixloom admin … --json` says of a server's folder; nothing that it finds is wrong."""
    done = command(server, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    assert answer.pop("findings") == []
    return dict(answer)


def command(server: Server, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """`mixloom admin … --json` with the settings of a server."""
    places = {"data_dir": server.data, **{k: v for k, v in server.settings.items() if k == "database_url"}}
    flags = [part for name, value in places.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return mixloom(server, ADMIN_KEY, "admin", *arguments, *flags, "--json")


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_backup_in_mid_run_restored_elsewhere_ends_every_job_with_the_undisturbed_bytes(
    kind: str, new_server: NewServer, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    def place() -> dict[str, str]:
        """An empty database."""
        return {"database_url": request.getfixturevalue("postgresql").new_database()} if kind == "postgresql" else {}

    original, backup = new_server(name="original", **place()).start(), tmp_path / "backup"
    client = original.tenant("alice")
    data = dataset(client, tmp_path)
    undisturbed = original.finish(*(submit(client, data, adapter, STEPS) for adapter in (MIXTURE, PLAIN)))
    arm(original.faults, Fault(point="pass.begin", kind="delay", seconds=0.5, times=10**6))  # they outlast what follows
    jobs = [submit(client, data, adapter, STEPS) for adapter in (MIXTURE, PLAIN)]
    wait_for(lambda: min(map(original.step, jobs)) >= 6)
    first = admin(original, "backup", str(backup))
    assert first["new"] == first["folders"]
    seen = min(map(original.step, jobs))
    wait_for(lambda: min(map(original.step, jobs)) >= seen + 11)  # of the points in the first backup none is left
    second = admin(original, "backup", str(backup))
    assert 0 < second["new"] < second["folders"], "what it had already is not copied again"
    assert second["removed"], "recovery points that have been overtaken go"
    assert {original.status(job) for job in jobs} == {"running"}, "it was made while they trained"
    original.end()
    shutil.rmtree(original.data)

    restored = new_server(name="restored", **place())
    restored.folder.mkdir()
    admin(restored, "restore", str(backup))
    steps = [restored.step(job) for job in jobs]
    assert min(steps) >= seen
    restored.start()
    assert restored.finish(*jobs) == undisturbed
    assert [restored.metric_steps(job) for job in jobs] == [list(range(1, STEPS + 1))] * 2
    assert restored.rows("SELECT attempts FROM runs WHERE job_id = ?", jobs[0])[0]["attempts"] == 2
    again = command(restored, "restore", str(backup))
    assert again.returncode == 1
    assert "is not empty" in again.stderr
