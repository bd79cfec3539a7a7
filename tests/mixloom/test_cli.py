"""The command line against the real API: what it prints, and its exit codes."""

import json
import os
import pickle
import re
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi import FastAPI

from mixloom import Client
from mixloom.jobs import POLL_SECONDS
from server.api.services import Services
from server.db.session import Database
from server.db.tables import Base, Daemon, Drain
from server.settings import Settings
from tests.mixloom.conftest import COLUMNS, Run, serving
from tests.server.conftest import ADMIN_KEY
from tests.server.making import add_adapter, add_expert_loads, add_metric, uploadable_adapter
from tests.server.test_uploads import LORA

COMMANDS = {
    "": "adapters admin api cancel config daemon datasets db demo download estimate experts generate jobs login logs "
    "me pause resume serve show submit wait watch",
    "admin": "backup doctor drain key queue restore status tenant undrain",
    "admin tenant": "add delete set",
    "admin key": "add list revoke",
    "datasets": "delete download fetch rows show upload",
    "adapters": "delete download files show upload",
    "db": "upgrade",
}


@pytest.mark.parametrize("group", COMMANDS)
def test_the_commands_are_these(group: str, run: Run) -> None:
    outcome = run(*group.split(), "--help")
    found = re.findall(r"^│ ([a-z]+)\s", outcome.out, re.MULTILINE)
    assert sorted(found) == COMMANDS[group].split()


def test_the_help_says_what_the_exit_codes_mean(run: Run) -> None:
    assert "3 no server answers" in " ".join(run("--help").out.split())


def test_no_server_is_exit_code_3_and_one_sentence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXLOOM_URL", "http://127.0.0.1:9")
    outcome = run("jobs")
    assert (outcome.code, outcome.out) == (3, "")
    assert outcome.err.startswith("error: No Mixloom server answers at http://127.0.0.1:9")
    assert outcome.err.count("\n") == 1


def test_a_wrong_key_is_exit_code_4(url: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXLOOM_URL", url)
    monkeypatch.setenv("MIXLOOM_API_KEY", "mxl_wrong")
    outcome = run("jobs")
    assert outcome.code == 4
    assert "key is wrong" in outcome.err


def test_a_server_that_cannot_answer_is_exit_code_5(
    operator: Client, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXLOOM_URL", operator.url)
    monkeypatch.setenv("MIXLOOM_API_KEY", operator.admin.create_tenant("alice")["key"])
    outcome = run("generate", "base", "Hello")
    assert outcome.code == 5
    assert "base" in outcome.err


@pytest.mark.parametrize(
    "arguments",
    [
        "nonsense",
        "jobs --nonsense",
        "submit",
        "submit missing.csv",
        "submit data.csv --column prompt",
        "show @last",
        "admin drain --quick --fast",
        "admin drain --graceful --deadline soon",
        "admin tenant set alice",
    ],
)
def test_wrong_usage_is_exit_code_2_and_no_traceback(arguments: str, run: Run) -> None:
    outcome = run(*arguments.split())
    assert outcome.code == 2
    assert outcome.out == ""
    assert "Traceback" not in outcome.err


def test_logging_in_asks_the_server_and_keeps_the_key(
    alice: Client, operator: Client, run: Run, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def login(key: str) -> int:
        monkeypatch.setattr(sys, "stdin", os.fdopen(_pipe(f"{key}\n")))
        return run("login", alice.url, "--key-stdin").code

    (tenant,) = operator.admin.tenants()
    assert login("mxl_wrong") == 4
    assert not list(own_home.rglob("login.json"))
    assert login(operator.admin.create_key(tenant["id"])["key"]) == 0
    assert json.loads(run("me", "--json").out)["tenant"]["name"] == "alice"
    (path,) = own_home.rglob("login.json")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert login(ADMIN_KEY) == 0
    assert run("admin", "queue").code == 0


def _pipe(text: str) -> int:
    read, write = os.pipe()
    os.write(write, text.encode())
    os.close(write)
    return read


def test_a_strangers_table_becomes_a_job_and_its_adapter_is_downloaded(
    as_alice: Run, table: Path, finish: Callable[[str], str], tmp_path: Path
) -> None:
    flags = (
        "--name",
        "sums",
        "--method",
        "lora",
        "--rank",
        "4",
        "--max-steps",
        "3",
        "--set",
        "training.seed=7",
    )
    submitted = as_alice("submit", str(table), *COLUMNS, *flags)
    assert submitted.code == 0, submitted.err
    assert re.fullmatch(r"job_\w+\n", submitted.out)
    assert "20 rows" in submitted.err
    job = json.loads(as_alice("show", "@last", "--json").out)
    assert (job["name"], job["adapter"]["rank"], job["training"]["seed"]) == ("sums", 4, 7)
    finish(job["id"])
    assert as_alice("wait", "@last").code == 0
    downloaded = as_alice("download", "@last", "-o", str(tmp_path / "sums.zip"))
    assert downloaded.out == f"{tmp_path / 'sums.zip'}\n"
    assert zipfile.ZipFile(tmp_path / "sums.zip").namelist() == ["README.md"]
    unpacked = as_alice("download", "sums", "-o", str(tmp_path / "sums.zip"), "--unpack")
    assert Path(unpacked.out.strip()) == tmp_path / "sums"
    assert (tmp_path / "sums" / "README.md").exists()


def test_a_yaml_file_is_a_job_and_flags_win_over_it(as_alice: Run, table: Path, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        "name: from yaml\ndata: data.csv\ncolumns: {prompt: question, completion: answer}\n"
        "adapter: {method: mixlora, rank: 4, num_experts: 4}\ntraining: {max_steps: 3}\n"
    )
    job = json.loads(as_alice("submit", str(file), "--rank", "8", "--json").out)
    assert (job["name"], job["adapter"]["rank"], job["adapter"]["num_experts"]) == ("from yaml", 8, 4)
    again = json.loads(as_alice("submit", "--from", "@last", "--name", "again", "--json").out)
    assert again["adapter"] == job["adapter"]
    cost = json.loads(as_alice("estimate", job["dataset"], "--max-steps", "5", "--json").out)
    assert cost["steps"] == 5


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """Another table, with columns of other names."""
    path = tmp_path / "words.csv"
    path.write_text("ask;reply\n" + "".join(f"Word {n}?;word {n}\n" for n in range(10)))
    return path


def test_several_files_and_data_sets_are_mixed_as_their_weights_say(as_alice: Run, table: Path) -> None:
    first = json.loads(as_alice("datasets", "upload", str(table), *COLUMNS, "--json").out)["id"]
    submitted = as_alice("submit", first, str(table), *COLUMNS, "--weight", "3", "--weight", "1", "--json")
    assert submitted.code == 0, submitted.err
    mixture = json.loads(submitted.out)["mixture"]
    assert [(part["weight"], part["rows"], part["epoch_rows"]) for part in mixture] == [(3, 20, 30), (1, 20, 10)]
    assert mixture[0]["id"] == first
    unweighted = json.loads(as_alice("estimate", first, str(table), *COLUMNS, "--json").out)
    assert [part["epoch_rows"] for part in unweighted["mixture"]] == [20, 20]
    again = json.loads(as_alice("submit", "--from", "@last", "--json").out)
    assert again["mixture"] == mixture


def test_a_yaml_file_lists_data_with_weights_and_columns(
    as_alice: Run, table: Path, words: Path, tmp_path: Path
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        "columns: {prompt: question, completion: answer}\ndata:\n- {data: data.csv, weight: 1}\n"
        "- {data: words.csv, weight: 0.5, columns: {prompt: ask, completion: reply}}\n"
    )
    mixture = json.loads(as_alice("submit", str(file), "--json").out)["mixture"]
    assert [(part["name"], part["weight"], part["rows"]) for part in mixture] == [
        ("data.csv", 1, 20),
        ("words.csv", 0.5, 10),
    ]
    flags = as_alice("submit", str(file), "--weight", "1", "--weight", "4", "--json")
    assert [part["weight"] for part in json.loads(flags.out)["mixture"]] == [1, 4]


@pytest.mark.parametrize(
    ("data", "arguments"),
    [
        ("", "data.csv data.csv --weight 1"),
        ("", "--from @last --weight 1"),
        ("data: data.csv", "job.yaml data.csv"),
        ("data: [{file: data.csv}]", "job.yaml"),
        ("data: [data.csv, 3]", "job.yaml"),
        ("data: {data: data.csv, wieght: 1}", "job.yaml"),
        ("dataset: data.csv", "job.yaml"),
        ("dataset: [{file: data.csv, weight: 1}]", "job.yaml"),
    ],
)
def test_a_mixture_that_is_unclear_is_wrong_usage(
    data: str, arguments: str, as_alice: Run, job_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job.yaml").write_text(data)
    monkeypatch.chdir(tmp_path)
    outcome = as_alice("submit", *arguments.split())
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")


def test_a_mixture_is_shown_by_the_names_of_its_sets(
    as_alice: Run, table: Path, words: Path, services: Services
) -> None:
    first = json.loads(as_alice("datasets", "upload", str(table), *COLUMNS, "--json").out)["id"]
    columns = ("--column", "prompt=ask", "--column", "completion=reply")
    job = as_alice("submit", first, str(words), *columns, "--validation", "0.1").out.strip()
    add_metric(services, job, 1, train_losses=[0.5, 0.25], valid_loss=0.5, valid_losses=[0.75, None])
    shown = as_alice("show", "@last").out
    assert "data.csv (weight 18, 18 rows, 18 an epoch), words.csv (weight 9, 9 rows, 9 an epoch)" in shown
    assert "train_loss.data.csv 0.5, train_loss.words.csv 0.25, valid_loss.data.csv 0.75" in shown


def test_a_job_can_start_from_an_adapter(as_alice: Run, alice: Client, job_id: str, services: Services) -> None:
    dataset, adapter = alice.jobs.get(job_id)["dataset"], add_adapter(services, job_id, 3)
    job = json.loads(as_alice("submit", dataset, "--init-from", adapter, "--json").out)
    assert job["init_from"]["adapter"] == adapter
    assert adapter in as_alice("show", job["id"]).out
    assert json.loads(as_alice("estimate", dataset, "--init-from", adapter, "--json").out)["adapter"] == job["adapter"]
    assert "adp_nothing" in as_alice("submit", dataset, "--init-from", "adp_nothing").err


def test_bad_rows_are_listed_one_a_line(as_alice: Run, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n{"prompt": "a", "completion": ""}\n')
    outcome = as_alice("datasets", "upload", str(file))
    assert outcome.code == 4
    lines = outcome.err.splitlines()
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("  line 2")
    assert lines[2].startswith("  line 3")


def test_a_job_is_shown_listed_and_steered(as_alice: Run, job_id: str) -> None:
    listed = as_alice("jobs").out.splitlines()
    assert listed[0].split("\t")[:3] == ["id", "name", "status"]
    assert listed[1].split("\t")[:5] == [job_id, "sums", "queued", "mixlora", "0/3"]
    assert "0 of 3" in as_alice("show", job_id[:12]).out
    assert as_alice("pause", "sums").out == f"{job_id}  sums: paused\n"
    assert as_alice("resume", "sums").out == f"{job_id}  sums: queued\n"
    assert json.loads(as_alice("cancel", "@last", "--json").out)[0]["status"] == "cancelled"
    kinds = [json.loads(line)["kind"] for line in as_alice("logs", "sums", "--follow", "--json").out.splitlines()]
    assert kinds[0] == "queued"
    assert kinds[-1] == "cancelled"
    assert "cancelled" in as_alice("logs", "sums").out


def test_loads_of_experts_are_a_table_of_steps_or_of_the_newest_ones_layers(
    as_alice: Run, job_id: str, services: Services
) -> None:
    assert "No step with loads" in as_alice("experts", "sums").err
    for step in (10, 20):
        add_expert_loads(services, job_id, step, [[step, step], [step, 3 * step]])
    lines = [line.split("\t") for line in as_alice("experts", "sums").out.splitlines()]
    assert lines[0] == ["step", "slots", "mean", "std", "least", "most"]
    assert lines[1:] == [[str(step), str(2 * step), "0.5000", "0.1250", "0.2500", "0.7500"] for step in (10, 20)]
    layers = [line.split("\t") for line in as_alice("experts", "sums", "--layers").out.splitlines()]
    assert layers[0] == ["layer", "std", "expert 0", "expert 1"]
    assert layers[2] == ["1", "0.2500", "0.2500", "0.7500"]
    assert [one["step"] for one in json.loads(as_alice("experts", "sums", "--json").out)] == [10, 20]


def test_watching_and_waiting_end_with_1_when_a_job_was_cancelled(as_alice: Run, job_id: str) -> None:
    as_alice("cancel", job_id)
    watched = as_alice("watch", job_id)
    assert watched.code == 1
    assert watched.out == "sums  0/3  cancelled\n"
    assert f"sums ({job_id}) cancelled" in watched.err
    assert json.loads(as_alice("watch", "@last", "--json").out)["status"] == "cancelled"
    assert as_alice("wait", job_id).code == 1
    assert as_alice("watch").code == 0  # nothing is left to watch


def test_datasets_and_adapters_are_listed_shown_and_deleted(
    as_alice: Run, job_id: str, finish: Callable[[str], str], tmp_path: Path
) -> None:
    (dataset,) = json.loads(as_alice("datasets", "--json").out)
    assert as_alice("datasets").out.splitlines()[1].startswith(dataset["id"])
    assert json.loads(as_alice("datasets", "rows", dataset["id"], "--limit", "1").out)["id"] == "0"
    saved = as_alice("datasets", "download", dataset["id"], "-o", str(tmp_path / "back.csv"))
    assert (tmp_path / "back.csv").read_text() == (tmp_path / "data.csv").read_text(), saved.err
    assert "20" in as_alice("datasets", "show", dataset["id"]).out
    assert as_alice("datasets", "delete", dataset["id"]).code == 0
    adapter = finish(job_id)
    assert as_alice("adapters").out.splitlines()[1].startswith(adapter)
    assert as_alice("adapters", "files", adapter).out.splitlines()[1].startswith("README.md")
    assert "mixlora" in as_alice("adapters", "show", adapter).out
    assert as_alice("adapters", "download", adapter, "-o", str(tmp_path)).out == f"{tmp_path / adapter}.zip\n"
    assert as_alice("adapters", "delete", adapter).code == 0


def test_an_adapter_is_uploaded_from_a_folder(as_alice: Run, base: Base, tmp_path: Path) -> None:
    folder = tmp_path / "from elsewhere"
    folder.mkdir()
    config, weights = uploadable_adapter(LORA, base)
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/model"}))
    assert as_alice("adapters", "upload", str(folder)).code == 2
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))
    refused = as_alice("adapters", "upload", str(folder))
    assert refused.code == 4
    assert "python -c" in refused.err
    (folder / "adapter_model.safetensors").write_bytes(weights)
    done = as_alice("adapters", "upload", str(folder))
    assert "'org/model'" in done.err
    assert done.out.strip() in as_alice("adapters").out
    made = json.loads(as_alice("adapters", "upload", str(folder), "--name", "mine", "--json").out)
    assert (made["name"], made["source"]["kind"]) == ("mine", "upload")
    assert json.loads(as_alice("adapters", "show", done.out.strip(), "--json").out)["name"] == "from elsewhere"


def test_the_operator_sees_and_steers_the_server(as_operator: Run, alice: Client) -> None:
    added = json.loads(as_operator("admin", "tenant", "add", "bob", "--share", "2", "--json").out)
    assert added["key"].startswith("mxl_")
    assert as_operator("admin", "tenant", "set", "bob", "--share", "3").code == 0
    assert "bob\t3.0" in as_operator("admin", "tenant").out
    key = json.loads(as_operator("admin", "key", "add", "bob", "--json").out)
    assert as_operator("admin", "key", "revoke", "bob", key["id"]).code == 0
    assert as_operator("admin", "key", "list", "bob").out.count("\n") == 3
    assert as_operator("admin", "drain", "--graceful", "--deadline", "30m", "--reason", "a new disk").code == 0
    status = json.loads(as_operator("admin", "status", "--json").out)
    assert (status["drain"]["mode"], status["drain"]["reason"]) == ("graceful", "a new disk")
    assert "a new disk" in as_operator("admin", "status").out
    (name,) = {daemon["name"] for daemon in json.loads(as_operator("admin", "status", "--json").out)["daemons"]}
    drained = as_operator("admin", "drain", "--daemon", name, "--exit", "--reason", "a broken fan")
    assert f"undrain --daemon {name}`" in drained.err
    assert f"drain of {name}" in as_operator("admin", "status").out
    assert f"but in {name};" in as_operator("admin", "undrain").err
    assert "No drain" in as_operator("admin", "undrain", "--daemon", name).err
    assert json.loads(as_operator("admin", "queue", "--json").out) == []
    assert as_operator("admin", "tenant", "delete", "bob").code == 0


def test_who_waits_for_a_drain_returns_when_all_rests_or_hears_that_it_was_ended(
    as_operator: Run, operator: Client, alice: Client, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rest(_seconds: float) -> None:
        with services.database.write() as session:
            session.get_one(Daemon, 1).rests_under = operator.admin.current_drain()["id"]

    monkeypatch.setattr("mixloom.cli.admin.time.sleep", rest)
    done = as_operator("admin", "drain", "--wait", "--json")
    assert (done.code, json.loads(done.out)["at_rest"]) == (0, True)
    name = operator.admin.daemons()[0]["name"]
    monkeypatch.setattr("mixloom.cli.admin.time.sleep", lambda _: operator.admin.undrain(name))
    done = as_operator("admin", "drain", "--wait", "--daemon", name)
    assert done.code == 4
    assert "ended or replaced" in done.err


def test_who_waits_for_a_drain_of_one_daemon_returns_when_that_rests_under_a_newer_one_of_all(
    as_operator: Run, operator: Client, alice: Client, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rest(_seconds: float) -> None:
        newer = operator.admin.drain("graceful", reason="a new disk")
        with services.database.write() as session:
            session.get_one(Daemon, 1).rests_under = newer["id"]

    monkeypatch.setattr("mixloom.cli.admin.time.sleep", rest)
    name = operator.admin.daemons()[0]["name"]
    done = as_operator("admin", "drain", "--wait", "--daemon", name, "--json")
    assert done.code == 0, done.err
    assert [json.loads(done.out)[field] for field in ("daemon", "at_rest")] == [name, True]
    assert operator.admin.current_drain(name)["reason"] == "a new disk"


def test_who_waits_for_a_drain_waits_through_outages_and_restarts_of_the_server(
    server: tuple[FastAPI, str],
    as_operator: Run,
    alice: Client,
    services: Services,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app, _ = server
    nowhere = Settings(data_dir=tmp_path / "nowhere").database

    def lose_the_database() -> None:
        app.state.services = replace(services, database=Database(nowhere))

    def stop() -> None:
        app.state.services = services
        first.close()

    def start_and_rest() -> None:
        second.enter_context(serving(app, port))
        with services.database.write() as session:
            session.get_one(Daemon, 1).rests_under = session.query(Drain).one().id

    happen = iter([lose_the_database, stop, start_and_rest])

    def sleep(seconds: float) -> None:
        if seconds == POLL_SECONDS:
            next(happen)()

    with ExitStack() as first, ExitStack() as second:
        port = first.enter_context(serving(app))
        monkeypatch.setenv("MIXLOOM_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setattr("mixloom.cli.admin.time.sleep", sleep)
        done = as_operator("admin", "drain", "--wait", "--json")
    assert (done.code, json.loads(done.out)["at_rest"]) == (0, True)
    assert done.err.count("Waiting for the server") == 1


def test_who_waits_for_a_drain_hears_of_a_refusal(
    server: tuple[FastAPI, str], as_operator: Run, alice: Client, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change_key(_seconds: float) -> None:
        server[0].state.services = replace(services, admin_key_sha256="0" * 64)

    monkeypatch.setattr("mixloom.cli.admin.time.sleep", change_key)
    assert as_operator("admin", "drain", "--wait").code == 4


def test_the_operators_commands_refuse_a_tenants_key(as_alice: Run) -> None:
    assert as_alice("admin", "queue").code == 4


def test_a_missing_server_package_is_one_sentence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixloom.cli.server.NEEDED", ("fastapi", "a_package_that_is_not_there"))
    outcome = run("serve", "--port", "0")
    assert outcome.code == 2
    assert "pip install 'mixloom[server]'" in outcome.err


def test_the_module_is_the_command_and_interrupts_leave_no_traceback() -> None:
    done = subprocess.run([sys.executable, "-m", "mixloom", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("mixloom")
