"""Uploaded adapters meet the engine: the API expects of files what the engine writes and other programs save."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine import formats
from engine.base_model import BaseModel
from engine.config import AdapterConfig
from engine.engine import Engine
from engine.memory import measure
from engine.run import Run
from server.adapter_files.config import disk_config, read_config
from server.adapter_files.layout import tensor_shapes
from server.api.services import Services
from server.daemon.publish import base_row
from tests.engine.loads import lora, mixlora, shake
from tests.engine.others import largest_difference, our_logprobs, publish, shake_gently, their_logprobs
from tests.models import tiny_model
from tests.server.conftest import Caller
from tests.server.daemon.conftest import Life, adapters, final_hash, job, submit
from tests.server.test_uploads import send

CONFIGS = {
    "LoRA": lora(),
    "rsLoRA": lora(8, rslora=True, alpha=3.5, dropout=0.0),
    "DoRA": lora(2, dora=True),
    "MixLoRA": mixlora(2, 3, 2),
    "MixDoRA on two modules": mixlora(2, 3, 1, dora=True, target_modules=("up_proj", "o_proj")),
}


@pytest.fixture
def engine(frozen: BaseModel) -> Engine:
    return Engine(frozen)


def saved(engine: Engine, config: AdapterConfig, folder: Path) -> Path:
    run = engine.create_run(config, seed=0)
    shake(run, 0)
    return publish(engine, run, folder)


def send_folder(caller: Caller, folder: Path, weights: str = formats.WEIGHTS) -> Any:
    return send(caller, (folder / formats.CONFIG).read_bytes(), (folder / weights).read_bytes(), weights)


def logprobs_of(engine: Engine, services: Services, adapter_id: str) -> list[torch.Tensor]:
    adapter = engine.load_adapter(services.store.path(f"uploads/{adapter_id}"))
    return our_logprobs(engine, Run.fresh(adapter, 0))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_the_engine_writes_comes_back_byte_for_byte(
    config: AdapterConfig, engine: Engine, life: Life, alice: Caller, services: Services, tmp_path: Path
) -> None:
    folder = saved(engine, config, tmp_path)
    base = base_row(engine.base, source=tmp_path, tokenizer={}, probed={}, memory=measure(engine.base))
    values = json.loads((folder / formats.CONFIG).read_text())
    assert read_config(values, base) == config.as_dict()
    assert disk_config(config.as_dict(), base) == values
    stored = load_file(folder / formats.WEIGHTS)
    assert tensor_shapes(config.as_dict(), base) == {name: list(tensor.shape) for name, tensor in stored.items()}
    made = send_folder(alice, folder).json()
    kept = services.store.path(f"uploads/{made['id']}")
    for name in (formats.WEIGHTS, formats.CONFIG):
        assert (kept / name).read_bytes() == (folder / name).read_bytes()
    assert made["sha256"] == hashlib.sha256((folder / formats.WEIGHTS).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"target_modules": "all-linear"}, torch.float32),
        ({"target_modules": ["v_proj", "down_proj"], "use_dora": True, "use_rslora": True}, torch.float32),
        ({"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}, torch.bfloat16),
    ],
    ids=["LoRA", "DoRA, rsLoRA", "LoRA in bfloat16"],
)
def test_what_peft_saved_says_here_what_it_says_there(
    options: dict[str, Any],
    dtype: torch.dtype,
    engine: Engine,
    life: Life,
    alice: Caller,
    services: Services,
    tmp_path: Path,
) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options))
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype).float()  # what the file will hold
    theirs = their_logprobs(model.eval())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(tmp_path)
    answer = send_folder(alice, tmp_path)
    assert answer.status_code == 201, answer.text
    ours = logprobs_of(engine, services, answer.json()["id"])
    assert largest_difference(ours, our_logprobs(engine, None)) > 0.5
    assert largest_difference(ours, theirs) < 1e-5


def test_a_bin_of_the_mixlora_package_is_taken_once_the_line_of_the_refusal_has_converted_it(
    engine: Engine, life: Life, alice: Caller, tmp_path: Path
) -> None:
    run = engine.create_run(mixlora(2, 3, 2), seed=0)
    shake_gently(run, 0, 0.1)
    native, exported = publish(engine, run, tmp_path / "native"), tmp_path / "mixlora"
    exported.mkdir()
    formats.export(native, exported, "mixlora")
    error = send_folder(alice, exported, "adapter_model.bin").json()["error"]
    assert error["code"] == "pickle_refused"
    line = error["message"][error["message"].index("python -c") :].replace("python", sys.executable, 1)
    subprocess.run(line, shell=True, check=True, cwd=exported, timeout=120)
    taken, ours = send_folder(alice, exported).json(), send_folder(alice, native).json()
    assert taken["sha256"] == ours["sha256"]
    assert taken["config"] == ours["config"]


def test_a_job_that_starts_from_an_upload_is_the_job_that_starts_from_the_original(
    engine: Engine, life: Life, alice: Caller, services: Services, tmp_path: Path
) -> None:
    first = submit(alice, {"method": "mixlora", "rank": 4, "num_experts": 4}, steps=3)
    life.finish()
    (original,) = adapters(services, first)
    uploaded = send_folder(alice, services.store.path(original.key)).json()
    ids = [submit(alice, {}, steps=4, init_from=one) for one in (original.id, uploaded["id"])]
    alice.delete(f"/adapters/{uploaded['id']}")
    life.finish()
    assert final_hash(services, ids[0]) == final_hash(services, ids[1]) != original.sha256
    assert job(services, ids[1]).init_from["adapter"] == uploaded["id"]
