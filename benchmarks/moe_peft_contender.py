"""MoE-PEFT, the MixLoRA authors' trainer: all jobs in one padded batch, in a process of its own environment.

It needs a transformers of 2024, so it cannot be imported here: `moe_peft_worker` runs under its own Python.
"""

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.bases import DROPOUT, LEARNING_RATE, MIXLORA, Bases, target_modules
from benchmarks.data import Step
from benchmarks.errors import BenchmarkError

PACKAGES = ("moe_peft", "torch", "transformers")
WORKER = Path(__file__).with_name("moe_peft_worker.py")
ERROR_LINES = 5


class MoePeft:
    """The worker ends with this process, when its standard input closes."""

    def __init__(self, bases: Bases):
        assert bases.moe_peft is not None
        self.folder = tempfile.TemporaryDirectory()
        base = Path(self.folder.name)
        write_old_base(bases.folder, base)
        self.errors = (base / "errors.txt").open("w+", encoding="utf-8")
        with machine.defaults():
            self.process = subprocess.Popen(
                [bases.moe_peft, "-P", WORKER],  # -P: modules beside the worker have names of others' packages
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                text=True,
            )
        answer = self._ask(
            {
                "base": str(base),
                "dtype": bases.dtype,
                "jobs": bases.jobs,
                "adapter": adapter_config(target_modules(bases.packed.model)),
                "learning_rate": LEARNING_RATE,
                "weight_decay": 0.0,
            }
        )
        self.trainable_parameters: int = answer["trainable_parameters"]

    def step(self, step: Step) -> float:
        jobs = [[{"tokens": row.tokens.tolist(), "targets": row.targets.tolist()} for row in rows] for rows in step]
        return float(self._ask(jobs)["loss"])

    def _ask(self, question: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps(question), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.errors.seek(0)
            said = "\n".join(self.errors.read().splitlines()[-ERROR_LINES:])
            raise BenchmarkError(f"MoE-PEFT ended with code {self.process.wait()} and said:\n{said}")
        return json.loads(answer)


def versions(python: Path) -> dict[str, str]:
    """Of MoE-PEFT and what it stands on.

    Raises:
        BenchmarkError: that Python does not have it, or is none.
    """
    asked = f"from importlib.metadata import version as v; print(*map(v, {PACKAGES}))"
    try:
        done = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.splitlines()[-1] if isinstance(error, subprocess.CalledProcessError) else str(error)
        raise BenchmarkError(f"--moe-peft is the Python of an environment with MoE-PEFT: {said}") from error
    return dict(zip(PACKAGES, done.stdout.split(), strict=True))


def adapter_config(modules: tuple[str, ...]) -> dict[str, Any]:
    """Our MixLoRA in MoE-PEFT's words."""
    return {
        "r": MIXLORA["rank"],
        "lora_alpha": int(MIXLORA["alpha"]),
        "lora_dropout": DROPOUT,
        "target_modules": list(modules),
        "routing_strategy": "mixlora",
        "num_experts": MIXLORA["num_experts"],
        "top_k": MIXLORA["top_k"],
        "router_aux_loss_coef": MIXLORA["router_aux_loss_coef"],
    }


def write_old_base(source: Path, folder: Path) -> None:
    """The base as transformers before 5 reads it: the same weights by links, and `rope_theta` in its old place.

    Raises:
        BenchmarkError: it is no Llama with plain rotary positions.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters", {})
    if config["model_type"] != "llama" or rope.get("rope_type", "default") != "default":
        raise BenchmarkError("--moe-peft is measured on Llama models with plain rotary positions, as SmolLM2 is.")
    old = config | {"rope_theta": rope.get("rope_theta", config.get("rope_theta", 10000.0))}
    (folder / "config.json").write_text(json.dumps(old), encoding="utf-8")
    for weights in source.glob("*.safetensors*"):
        (folder / weights.name).symlink_to(weights.resolve())
