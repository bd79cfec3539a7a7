"""From rows over REST to other programs: `/generate` scores a prompt as they do with the files that are downloaded."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from mixloom import Client
from tests.e2e.making import dataset, submit
from tests.e2e.server import Server
from tests.models import smollm2_folder

PROMPT = "What is 003?"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("smollm2"), smollm2_folder(), threads=0)
    try:
        yield server.start()
    finally:
        server.end()


def downloaded(client: Client, job: str, layout: str, base: Path, folder: Path) -> Path:
    """Its files, which name the base by the folder where this machine has it."""
    with ZipFile(client.jobs.download_adapter(job, folder / f"{layout}.zip", format=layout)) as archive:
        archive.extractall(folder / layout)
    config = folder / layout / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(base)}))
    return folder / layout


def read_by(program: str, folder: Path, base: Path) -> nn.Module:
    package = pytest.importorskip(program)
    if program == "mixlora":
        model, _ = package.MixLoraModelForCausalLM.from_pretrained(str(folder), attn_implementation="eager")
        return model.eval()
    return package.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()


@torch.no_grad()
def logprobs_of(model: nn.Module, tokens: list[int]) -> list[float]:
    """log p of every token but the first, in float32."""
    ids = torch.tensor(tokens)
    logits = model.float()(input_ids=ids[None]).logits[0, :-1]
    return F.log_softmax(logits, -1).gather(1, ids[1:, None])[:, 0].tolist()


programs = pytest.mark.parametrize(
    ("program", "adapter"),
    [
        ("mixlora", {"method": "mixlora", "rank": 4, "num_experts": 4, "top_k": 2, "dropout": 0}),
        ("peft", {"method": "lora", "rank": 8}),
    ],
    ids=["MixLoRA in mixlora", "LoRA in PEFT"],
)


@programs
def test_generate_scores_as_the_program_that_reads_the_download(
    server: Server, base: Path, program: str, adapter: dict[str, Any], tmp_path: Path
) -> None:
    compare(server, base, program, adapter, tmp_path, tolerance=1e-5)


@pytest.mark.smollm2
@pytest.mark.slow
@programs
def test_generate_scores_as_the_program_that_reads_the_download_with_smollm2(
    smollm2: Server, program: str, adapter: dict[str, Any], tmp_path: Path
) -> None:
    compare(smollm2, smollm2_folder(), program, adapter, tmp_path, tolerance=1e-4)


def compare(
    server: Server, base: Path, program: str, adapter: dict[str, Any], tmp_path: Path, *, tolerance: float
) -> None:
    """The tolerance is as where the engine alone is compared with these programs: one rounding of float32 grows."""
    client = server.tenant(f"{program} {base.name}")
    job = submit(client, dataset(client, tmp_path), adapter, 6, training={"learning_rate": 1e-2}, validation=0)
    server.finish(job)
    ours, of_base = (client.generate(model, PROMPT, max_tokens=0, logprobs=True) for model in (job, "base"))
    model = read_by(program, downloaded(client, job, program, base, tmp_path), base)
    theirs = logprobs_of(model, ours["prompt_tokens"])
    assert ours["prompt_logprobs"][1:] == pytest.approx(theirs, abs=tolerance, rel=0)
    changes = [abs(a - b) for a, b in zip(ours["prompt_logprobs"][1:], of_base["prompt_logprobs"][1:], strict=True)]
    assert max(changes) > 0.1, "the adapter says something of its own"
