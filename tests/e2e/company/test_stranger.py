"""What a stranger does first: a CSV of their own becomes an adapter on their disk by two commands."""

import csv
import hashlib
import json
import zipfile
from pathlib import Path

from tests.e2e.command_line import mixloom
from tests.e2e.server import Server

TRAINING = ("--rank", "4", "--max-steps", "12", "--batch-size", "4")
COLUMNS = ("--column", "prompt=question", "--column", "completion=answer")


def write_csv(path: Path, delimiter: str = ";") -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["question", "answer"])
        writer.writerows([f"How much is {n}; and {n}?", f"{n + n}, I think\nor so."] for n in range(20))


def test_a_csv_becomes_a_downloaded_adapter_by_two_commands(server: Server, tmp_path: Path) -> None:
    server.tenant("stranger")
    key = server.key("stranger")
    write_csv(tmp_path / "data.csv")
    submitted = mixloom(server, key, "submit", "data.csv", *COLUMNS, *TRAINING, "--watch", folder=tmp_path)
    assert submitted.returncode == 0, submitted.stderr
    downloaded = mixloom(server, key, "download", "@last", folder=tmp_path)
    assert downloaded.returncode == 0, downloaded.stderr

    (archive,) = tmp_path.glob("*.zip")
    (job,) = server.tenant("stranger").jobs.list()
    assert job["status"] == "succeeded"
    with zipfile.ZipFile(archive) as files:
        weights = files.read("adapter_model.safetensors")
        config = json.loads(files.read("adapter_config.json"))
        card = files.read("README.md").decode()
    assert hashlib.sha256(weights).hexdigest() == job["adapter_sha256"]
    assert (config["r"], config["peft_type"]) == (4, "MIXLORA")
    assert "How much is" in card

    answered = mixloom(server, key, "generate", "@last", "How much is 3; and 3?", "--max-tokens", "5")
    assert answered.returncode == 0, answered.stderr


def test_without_the_columns_they_are_told_which_would_do(server: Server, tmp_path: Path) -> None:
    server.tenant("stranger")
    write_csv(tmp_path / "data.csv")
    refused = mixloom(server, server.key("stranger"), "submit", "data.csv", folder=tmp_path)
    assert refused.returncode != 0
    assert "question" in refused.stderr
    assert "answer" in refused.stderr
    assert "Traceback" not in refused.stderr
