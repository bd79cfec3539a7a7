"""A run that was saved and loaded goes on with the same bits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from engine import recovery
from engine.config import AdapterConfig
from engine.engine import Engine
from engine.errors import EngineError
from engine.run import Microbatch, Run
from tests.engine.gangs import fingerprint
from tests.engine.loads import lora, mixlora, random_row

CONFIGS = {
    "LoRA": lora(),
    "MixLoRA": mixlora(dropout=0.3),
    "rsLoRA on two modules": lora(8, rslora=True, target_modules=("q_proj", "up_proj")),
    "DoRA": lora(dora=True),
    "MixDoRA": mixlora(dora=True),
}
MICROBATCHES = [[random_row(n, np.random.default_rng(n)) for n in lengths] for lengths in ([9, 14], [20], [5, 5, 5])]


def microbatch(engine: Engine, run: Run, index: int) -> None:
    engine.forward_backward([Microbatch(rows=MICROBATCHES[index], run=run)])


def trained(engine: Engine, config: AdapterConfig, num_microbatches: int) -> Run:
    """A run after so many microbatches, three to an optimizer step."""
    run = engine.create_run(config, seed=3)
    return continued(engine, run, range(num_microbatches))


def continued(engine: Engine, run: Run, numbers: range) -> Run:
    for number in numbers:
        microbatch(engine, run, number % 3)
        if number % 3 == 2:
            engine.optim_step(run, learning_rate=0.01)
    return run


@pytest.fixture(scope="module")
def undisturbed(engine: Engine) -> dict[str, str]:
    """What runs come to that are never saved, by the names of their configs."""
    return {name: fingerprint(trained(engine, config, 12)) for name, config in CONFIGS.items()}


@pytest.mark.parametrize("num_microbatches", [0, 3, 4, 8], ids="saved after {} microbatches".format)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_loaded_run_ends_with_the_bits_of_an_undisturbed_one(
    engine: Engine, undisturbed: dict[str, str], name: str, num_microbatches: int, tmp_path: Path
) -> None:
    engine.save(trained(engine, CONFIGS[name], num_microbatches), tmp_path)
    loaded = continued(engine, engine.load(tmp_path), range(num_microbatches, 12))
    assert fingerprint(loaded) == undisturbed[name]


def test_everything_that_a_run_is_comes_back(engine: Engine, tmp_path: Path) -> None:
    run = trained(engine, mixlora(), 5)
    engine.save(run, tmp_path)
    loaded = engine.load(tmp_path)
    assert (loaded.seed, loaded.step, loaded.microbatch) == (3, 1, 2)
    assert loaded.adapter.config == run.adapter.config
    assert loaded.gradient.abs().max() > 0
    for ours, theirs in [
        (loaded.adapter.flat, run.adapter.flat),
        (loaded.gradient, run.gradient),
        (loaded.optimizer.first, run.optimizer.first),
        (loaded.optimizer.second, run.optimizer.second),
    ]:
        assert torch.equal(ours, theirs)


def test_a_loaded_run_learns_into_its_own_gradient(engine: Engine, tmp_path: Path) -> None:
    engine.save(trained(engine, lora(), 4), tmp_path)
    run = engine.load(tmp_path)
    before = run.gradient.clone()
    microbatch(engine, run, 1)
    assert not torch.equal(run.gradient, before)


def test_a_capture_does_not_change_while_training_goes_on(engine: Engine, tmp_path: Path) -> None:
    run = trained(engine, mixlora(), 4)
    snapshot = recovery.capture(run)
    expected = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
    continued(engine, run, range(4, 9))
    assert expected.keys() == {"parameters", "first", "second", "gradient"}
    assert all(torch.equal(snapshot.tensors[name], tensor) for name, tensor in expected.items())
    recovery.write(snapshot, tmp_path)
    assert fingerprint(continued(engine, engine.load(tmp_path), range(4, 9))) == fingerprint(run)


def test_between_optimizer_steps_the_gradient_is_not_stored(engine: Engine, tmp_path: Path) -> None:
    engine.save(trained(engine, lora(), 3), tmp_path)
    with safe_open(tmp_path / "state.safetensors", "pt") as file:
        assert set(file.keys()) == {"parameters", "first", "second"}


def test_the_same_state_gives_the_same_bytes(engine: Engine, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
        engine.save(trained(engine, mixlora(), 4), folder)
    for name in ("state.safetensors", "run.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def changed(folder: Path, **values: object) -> None:
    state = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(state | values))


def test_a_recovery_point_of_another_schema_is_refused(engine: Engine, tmp_path: Path) -> None:
    engine.save(trained(engine, lora(), 3), tmp_path)
    changed(tmp_path, schema=99)
    with pytest.raises(EngineError, match="this recovery point has schema 99, this engine reads 2"):
        engine.load(tmp_path)


def test_tensors_that_do_not_fit_the_configuration_are_refused(engine: Engine, tmp_path: Path) -> None:
    run = trained(engine, lora(), 3)
    engine.save(run, tmp_path)
    changed(tmp_path, config=lora(8).as_dict())
    size = run.adapter.flat.numel()
    with pytest.raises(EngineError, match=f"has {size} parameters, the configuration has {2 * size}"):
        engine.load(tmp_path)


def test_a_run_of_another_base_is_refused(engine: Engine, tmp_path: Path) -> None:
    engine.save(trained(engine, lora(), 3), tmp_path)
    changed(tmp_path, config=lora(target_modules=("qkv_proj",)).as_dict())
    with pytest.raises(EngineError, match="target module 'qkv_proj' matches nothing"):
        engine.load(tmp_path)
