"""The README's commands run as they stand there, one after another, on a real server with a tiny base."""

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.base_folder import write_tiny_base
from tests.e2e.server import free_port

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
SECONDS = 240
BLOCK = re.compile(r"<!-- test -->\n```(sh|python)\n(.*?)```", re.DOTALL)


def blocks() -> list[tuple[str, str]]:
    """(language, code) of the blocks that are marked to be tested."""
    return BLOCK.findall(README.read_text(encoding="utf-8"))


def as_script(port: int) -> str:
    """All blocks as one bash script. The port alone is another one, since 8000 may be in use."""
    parts = [code if language == "sh" else f"python3 - <<'PYTHON'\n{code}PYTHON\n" for language, code in blocks()]
    script = "\n".join(parts)
    assert script.count(":8000") == 1
    return script.replace(":8000", f":{port}")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A home of its own, `mixloom` and `python3` of this checkout and environment, and a tiny base."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, arguments in (("python3", ""), ("mixloom", "-P -m mixloom")):
        (commands / name).write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
        (commands / name).chmod(0o755)
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("MIXLOOM_", "XDG_"))}
    return {
        **ours,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path),
        "MIXLOOM_BASE": str(write_tiny_base(tmp_path / "base")),
        "MIXLOOM_DTYPE": "float32",
    }


@pytest.fixture
def said(environment: dict[str, str], tmp_path: Path) -> str:
    """What the script prints. Whatever it leaves running is ended."""
    port, folder, log = free_port(), tmp_path / "work", tmp_path / "log"
    folder.mkdir()
    with log.open("w") as file:
        process = subprocess.Popen(
            ["bash", "-e", "-o", "pipefail", "-c", as_script(port)],
            cwd=folder,
            env={**environment, "MIXLOOM_PORT": str(port)},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        code = process.wait(SECONDS)
    finally:
        with suppress(ProcessLookupError):  # the whole group: a script that fails leaves its server
            os.killpg(process.pid, signal.SIGKILL)
    assert code == 0, log.read_text()
    return log.read_text()


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_commands_of_the_readme_do_what_it_says(said: str, tmp_path: Path) -> None:
    work = tmp_path / "work"
    assert (work / "sums" / "adapter_model.safetensors").exists()
    assert (work / "sums-mixlora.zip").read_bytes().startswith(b"PK")
    assert '"object":"generation"' in said
    assert re.search(r"^\d\.\d+$", said, re.MULTILINE), "the loss that the Python block prints"
    assert "Everything rests." in said
    assert '"stopped"' in said, "the daemon's last line, after all was saved"


def test_each_command_block_of_the_first_job_is_tested() -> None:
    (section,) = re.findall(r"## The first job\n(.*?)\n## ", README.read_text(encoding="utf-8"), re.DOTALL)
    assert section.count("```") == 2 * len(blocks()) == 10
