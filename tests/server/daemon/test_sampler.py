"""`/generate` through the real daemon: what a broken adapter does to others (nothing)."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.formats import WEIGHTS
from server.api.services import Services
from tests.server.conftest import Caller
from tests.server.daemon.conftest import MIXTURE, Life, adapters, submit


def ask(life: Life, caller: Caller, *bodies: dict) -> list[httpx.Response]:
    """What `/generate` answers to requests that wait together while the daemon turns."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        futures = [pool.submit(caller.post, "/generate", json=body) for body in bodies]
        while not all(future.done() for future in futures):
            life.turn()
        return [future.result() for future in futures]


@pytest.mark.parametrize(
    "options", [{"temperature": 1}, {"temperature": 0}, {"max_tokens": 0, "logprobs": True}], ids=str
)
def test_an_adapter_whose_numbers_broke_gets_a_reason_and_others_an_answer(
    options: dict, life: Life, alice: Caller, services: Services
) -> None:
    job_id = submit(alice, MIXTURE, steps=1)
    life.finish()
    (adapter,) = adapters(services, job_id)
    path = services.store.path(adapter.key) / WEIGHTS
    save_file({name: torch.full_like(tensor, 1e38) for name, tensor in load_file(path).items()}, path)
    asked = {"prompt": "Where is the user?", "max_tokens": 4}
    broken, whole = ask(life, alice, {"model": adapter.id} | asked | options, {"model": "base"} | asked)
    assert broken.status_code == 422
    assert broken.json()["error"]["code"] == "adapter_diverged"
    assert "Take an earlier checkpoint" in broken.json()["error"]["message"]
    assert whole.status_code == 200
    assert len(whole.json()["tokens"]) == 4
