"""The built wheel, installed away from the checkout, beside nothing but the packages that it declares."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mixloom import Client
from tests.base_folder import write_tiny_base

ROOT = Path(__file__).parent.parent
ADMIN_KEY = "an-admin-key-of-more-than-32-characters"
START_SECONDS = 120


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel in it, and an empty folder to run in."""

    python: Path
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """This process's, without what could lead to the checkout or to a server of this machine."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MIXLOOM_", "PYTHON"))}
        return {**kept, "HOME": str(self.folder), "OMP_WAIT_POLICY": "passive", "MIXLOOM_ADMIN_KEY": ADMIN_KEY}

    def command(self, *arguments: str) -> list[str]:
        return [str(self.python.with_name("mixloom")), *arguments]

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.folder,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def plain(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """`pip install mixloom`."""
    return install(wheel, tmp_path_factory.mktemp("plain"), extra="")


@pytest.fixture(scope="module")
def full(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """`pip install 'mixloom[server]'`."""
    return install(wheel, tmp_path_factory.mktemp("full"), extra="server")


def install(wheel: Path, folder: Path, *, extra: str) -> Installed:
    """The wheel in an environment of its own. What it declares is linked there from this environment, not fetched."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (metadata,) = site.glob("mixloom-*.dist-info")
    for needed in declared(Distribution.at(metadata), {extra}).values():
        for top in {file.parts[0] for file in needed.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(needed.locate_file(top))))
    (folder / "home").mkdir()
    return Installed(python, folder / "home")


def declared(package: Distribution, extras: set[str]) -> dict[str, Distribution]:
    """All that a package needs, and what that needs, by name."""
    found: dict[str, Distribution] = {}
    waiting = [(package, extras)]
    while waiting:
        package, extras = waiting.pop()
        for requirement in map(Requirement, package.requires or ()):
            marker, name = requirement.marker, canonicalize_name(requirement.name)
            is_needed = marker is None or any(marker.evaluate({"extra": extra}) for extra in extras or {""})
            if is_needed and name not in found:
                found[name] = distribution(name)
                waiting.append((found[name], requirement.extras))
    return found


@pytest.fixture(scope="module")
def served(full: Installed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """`mixloom serve` of the installed wheel, ready, on a tiny base; as the operator sees it."""
    base, log = write_tiny_base(tmp_path_factory.mktemp("base")), full.folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            full.command("serve", "--base", str(base), "--port", "0", "--dtype", "float32", "--threads", "1"),
            cwd=full.folder,
            env=full.environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        end = time.monotonic() + START_SECONDS
        while not (address := re.search(r"listens on (\S+)", log.read_text())):
            assert process.poll() is None and time.monotonic() < end, log.read_text()  # noqa: PT018
            time.sleep(0.1)
        with Client(address[1], ADMIN_KEY) as client:
            while client.ready()["status"] != "ready":
                assert process.poll() is None and time.monotonic() < end, log.read_text()  # noqa: PT018
                time.sleep(0.1)
            yield client
    finally:
        process.terminate()
        code = process.wait(60)
    assert code == 0, log.read_text()


def test_the_installed_wheel_is_what_runs(full: Installed, plain: Installed) -> None:
    for installed in (full, plain):
        where = installed.run(str(installed.python), "-c", "import mixloom; print(mixloom.__file__)").stdout
        assert Path(where).is_relative_to(installed.python.parents[1]), where


def test_the_server_of_the_wheel_becomes_ready_and_keeps_its_data_where_it_was_started(
    full: Installed, served: Client
) -> None:
    assert served.base()["parameters"] > 0
    assert (full.folder / "mixloom-data" / "mixloom.db").exists()


def test_the_plain_wheel_lists_jobs_without_torch(plain: Installed, served: Client) -> None:
    key = served.admin.create_tenant("alice")["key"]
    listed = plain.run(*plain.command("jobs"), MIXLOOM_URL=served.url, MIXLOOM_API_KEY=key)
    assert (listed.returncode, listed.stdout.split()[:2]) == (0, ["id", "name"]), listed.stderr
    for module in ("torch", "fastapi", "sqlalchemy", "numpy"):
        assert plain.run(str(plain.python), "-c", f"import {module}").returncode == 1


def test_the_plain_wheel_without_a_server_says_so(plain: Installed) -> None:
    done = plain.run(*plain.command("jobs"), MIXLOOM_URL="http://127.0.0.1:9")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("error: No Mixloom server answers at http://127.0.0.1:9")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        "serve",
        "db upgrade",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("api", "daemon", "config", "demo")),
    ],
)
def test_the_plain_wheel_says_what_the_servers_commands_need(command: str, plain: Installed) -> None:
    done = plain.run(*plain.command(*command.split()))
    assert (done.returncode, done.stdout) == (2, "")
    assert "pip install 'mixloom[server]'" in done.stderr
