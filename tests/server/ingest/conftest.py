"""A reader of files over a tiny base."""

from pathlib import Path

import pytest

from server.render import Renderer
from tests.server.ingest.reading import Reader
from tests.tiny import write_tiny_tokenizer


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    folder = tmp_path_factory.mktemp("base")
    write_tiny_tokenizer(folder)
    return Renderer(folder)


@pytest.fixture
def read(tmp_path: Path, renderer: Renderer) -> Reader:
    return Reader(tmp_path, renderer)
