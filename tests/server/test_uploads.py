"""Adapters that tenants send: what is kept, and what is refused by name. Values are checked in `test_safetensors`."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from server.api.services import Services
from server.db.tables import Adapter, Base
from tests.server.conftest import TARGETS, Caller
from tests.server.making import prompt_rows, submit, uploadable_adapter
from tests.server.making import upload as upload_rows

pytestmark = pytest.mark.usefixtures("base")

WEIGHTS = "adapter_model.safetensors"
LORA = {"method": "lora", "rank": 4, "alpha": 8, "dropout": 0.1, "dora": False, "rslora": False}
LORA |= {"target_modules": ["q_proj", "down_proj"], "num_experts": None, "top_k": None, "router_aux_loss_coef": None}
MIXLORA = {**LORA, "method": "mixlora", "num_experts": 3, "top_k": 2, "router_aux_loss_coef": 0.01}
ADAPTERS = {
    "LoRA": LORA,
    "DoRA, rsLoRA": {**LORA, "dora": True, "rslora": True},
    "MixLoRA": MIXLORA,
    "MixDoRA": {**MIXLORA, "dora": True, "alpha": 2.5, "target_modules": ["up_proj"]},
}


def send(caller: Caller, config: Any, weights: bytes, file_name: str = WEIGHTS, **fields: Any) -> Any:
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    files = {"config": ("adapter_config.json", text), "weights": (file_name, weights)}
    return caller.post("/adapters", files=files, data=fields)


def kept(services: Services) -> tuple[int, list[str]]:
    """(rows, folders) of adapters."""
    with services.database.read() as session:
        return session.query(Adapter).count(), services.store.list("uploads")


def refused(answer: Any, code: str, param: str | None, services: Services, status: int = 422) -> dict[str, Any]:
    """The error, after a look that nothing was kept."""
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param), error
    assert kept(services) == (0, [])
    return dict(error)


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_an_upload_is_an_adapter_like_any_other(
    adapter: dict[str, Any], alice: Caller, bob: Caller, base: Base, services: Services
) -> None:
    config, weights = uploadable_adapter(adapter, base)
    answer = send(alice, config, weights)
    made = answer.json()
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == f"/adapters/{made['id']}"
    assert (made["config"], made["method"], made["source"]) == (adapter, adapter["method"], {"kind": "upload"})
    assert (made["base"], made["warnings"]) == ({"name": "tiny", "hash": base.hash}, [])
    shown = alice.get(f"/adapters/{made['id']}").json()
    assert shown == {key: value for key, value in made.items() if key != "warnings"}
    files = {file["name"]: file for file in alice.get(f"/adapters/{made['id']}/files").json()["data"]}
    assert set(files) == {"README.md", "adapter_config.json", WEIGHTS}
    assert files[WEIGHTS]["sha256"] == made["sha256"]
    content = alice.get(f"/adapters/{made['id']}/files/{WEIGHTS}").content
    assert load(content).keys() == load(weights).keys()
    again = send(alice, config, content).json()
    assert (again["sha256"], again["bytes"]) == (made["sha256"], len(content))
    assert bob.get(f"/adapters/{made['id']}").status_code == 404
    job = submit(alice, upload_rows(alice, prompt_rows(12)), init_from=made["id"])
    assert job["adapter"] == adapter
    with zipfile.ZipFile(io.BytesIO(alice.get(f"/adapters/{made['id']}/archive").content)) as archive:
        assert archive.read(WEIGHTS) == content
    assert alice.delete(f"/adapters/{made['id']}").status_code == 200
    assert not services.store.path(f"uploads/{made['id']}").exists()


def test_smaller_types_are_kept_in_float32(alice: Caller, base: Base, services: Services) -> None:
    config, weights = uploadable_adapter(LORA, base)
    halves = {name: tensor.astype(np.float16) for name, tensor in load(weights).items()}
    made = send(alice, config, save(halves)).json()
    stored = load((services.store.path(f"uploads/{made['id']}") / WEIGHTS).read_bytes())
    assert all(np.array_equal(stored[name], half.astype(np.float32)) for name, half in halves.items())
    assert {str(tensor.dtype) for tensor in stored.values()} == {"float32"}


def test_all_linear_means_every_projection_of_the_base(alice: Caller, base: Base) -> None:
    config, weights = uploadable_adapter({**LORA, "target_modules": list(TARGETS)}, base)
    made = send(alice, {**config, "target_modules": "all-linear"}, weights).json()
    assert made["config"]["target_modules"] == list(TARGETS)


PATHS = {name: f"{'mlp' if name in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{name}" for name in TARGETS}


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ([f"model.layers.{layer}.{path}" for layer in (1, 0) for path in PATHS.values()], list(TARGETS)),
        (["mlp.down_proj", "self_attn.q_proj"], ["q_proj", "down_proj"]),
        (["layers.0.self_attn.q_proj", "mlp.up_proj", "layers.1.self_attn.q_proj"], ["q_proj", "up_proj"]),
        (["down_proj", "q_proj"], ["down_proj", "q_proj"]),
    ],
    ids=["paths, as PEFT saves all-linear", "ends of paths", "some of each", "names"],
)
def test_modules_are_named_as_peft_names_them(asked: list[str], meant: list[str], alice: Caller, base: Base) -> None:
    config, weights = uploadable_adapter({**LORA, "target_modules": meant}, base)
    assert send(alice, {**config, "target_modules": asked}, weights).json()["config"]["target_modules"] == meant


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        (["model.layers.0.self_attn.q_proj"], "unsupported_adapter_field"),
        (["mlp.q_proj"], "unknown_target"),
        (["attn.q_proj"], "unknown_target"),
        (["mlp.up_proj", "lm_head"], "unknown_target"),
        (["model.layers.2.self_attn.q_proj", "up_proj"], "unknown_target"),
        ([""], "unknown_target"),
        ([], "invalid_adapter_config"),
    ],
)
def test_modules_that_are_not_there_or_in_some_layers_only_are_refused(
    asked: list[str], code: str, alice: Caller, base: Base, services: Services
) -> None:
    config, weights = uploadable_adapter(LORA, base)
    refused(send(alice, {**config, "target_modules": asked}, weights), code, "config.target_modules", services)


def test_the_name_of_another_base_is_warned_of_and_kept_in_the_readme(alice: Caller, base: Base) -> None:
    config, weights = uploadable_adapter(LORA, base)
    made = send(alice, {**config, "base_model_name_or_path": "org/a-model"}, weights).json()
    assert "'org/a-model'" in made["warnings"][0]
    assert "'tiny'" in made["warnings"][0]
    assert "org/a-model" in alice.get(f"/adapters/{made['id']}/files/README.md").text
    assert send(alice, {**config, "base_model_name_or_path": None}, weights).json()["warnings"] == []


UNSUPPORTED: dict[str, Any] = {
    "peft_type": "VERA",
    "bias": "all",
    "task_type": "SEQ_CLS",
    "modules_to_save": ["lm_head"],
    "rank_pattern": {"q_proj": 8},
    "alpha_pattern": {"q_proj": 8},
    "layers_to_transform": [0],
    "layer_replication": [[0, 1]],
    "exclude_modules": ["k_proj"],
    "trainable_token_indices": [1],
    "target_parameters": ["x"],
    "fan_in_fan_out": True,
    "lora_bias": True,
    "use_qalora": True,
    "alora_invocation_tokens": [1],
    "init_lora_weights": "pissa",
    "target_modules": ".*_proj",
    "num_experts": 4,
    "a_field_of_the_future": {"on": True},
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_what_peft_can_and_we_cannot_is_refused_by_name(
    field: str, alice: Caller, base: Base, services: Services
) -> None:
    config, weights = uploadable_adapter(LORA, base)
    answer = send(alice, {**config, field: UNSUPPORTED[field]}, weights)
    assert f"'config.{field}'" in refused(answer, "unsupported_adapter_field", f"config.{field}", services)["message"]


@pytest.mark.parametrize(
    ("adapter", "changes", "code", "param"),
    [
        (LORA, {"r": None}, "missing_field", "config.r"),
        (LORA, {"r": 0}, "invalid_adapter_config", "config.r"),
        (LORA, {"r": "4"}, "invalid_adapter_config", "config.r"),
        (LORA, {"r": 33}, "rank_too_large", "config.r"),
        (LORA, {"lora_alpha": -1}, "invalid_adapter_config", "config.lora_alpha"),
        (LORA, {"lora_dropout": 1}, "invalid_adapter_config", "config.lora_dropout"),
        (LORA, {"use_dora": "yes"}, "invalid_adapter_config", "config.use_dora"),
        (LORA, {"target_modules": None}, "missing_field", "config.target_modules"),
        (LORA, {"target_modules": ["lm_head"]}, "unknown_target", "config.target_modules"),
        (LORA, {"target_modules": ["q_proj", "q_proj"]}, "target_twice", "config.target_modules"),
        (LORA, {"target_modules": [1]}, "invalid_adapter_config", "config.target_modules"),
        (MIXLORA, {"num_experts": None}, "missing_field", "config.num_experts"),
        (MIXLORA, {"top_k": 4}, "top_k_too_large", "config.top_k"),
        (MIXLORA, {"target_modules": ["q_proj"]}, "no_expert_target", "config.target_modules"),
        (MIXLORA, {"act_fn": "relu"}, "unsupported_adapter_field", "config.act_fn"),
        (MIXLORA, {"routing_strategy": "mixlora-switch"}, "unsupported_adapter_field", "config.routing_strategy"),
        (MIXLORA, {"expert_lora": {"r": 8}}, "unsupported_adapter_field", "config.expert_lora"),
    ],
)
def test_a_config_that_means_no_adapter_of_this_base_is_refused(
    adapter: dict[str, Any],
    changes: dict[str, Any],
    code: str,
    param: str,
    alice: Caller,
    base: Base,
    services: Services,
) -> None:
    config, weights = uploadable_adapter({**adapter, "target_modules": ["q_proj", "k_proj", "up_proj"]}, base)
    refused(send(alice, {**config, **changes}, weights), code, param, services)


def without(tensors: dict[str, np.ndarray]) -> None:
    del tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"]


def with_another(tensors: dict[str, np.ndarray]) -> None:
    tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((4, 64), np.float32)


def reshaped(tensors: dict[str, np.ndarray]) -> None:
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = np.zeros((64, 4), np.float32)


def another_rank(tensors: dict[str, np.ndarray]) -> None:
    for name, tensor in list(tensors.items()):
        tensors[name] = np.concatenate([tensor, tensor], axis=0 if "lora_A" in name else 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without, "1 missing"),
        (with_another, "1 unknown"),
        (reshaped, "1 of another shape"),
        (another_rank, "8 of another shape"),
    ],
)
def test_tensors_that_are_not_exactly_those_of_the_config_are_refused(
    change: Callable[[dict[str, np.ndarray]], None], said: str, alice: Caller, base: Base, services: Services
) -> None:
    config, weights = uploadable_adapter(LORA, base)
    tensors = load(weights)
    change(tensors)
    error = refused(send(alice, config, save(tensors)), "adapter_does_not_fit", "weights", services)
    assert said in error["message"]
    assert 1 <= len(error["details"]) <= 20


def test_an_adapter_of_a_larger_base_does_not_fit(
    alice: Caller, base: Base, publish_base: Callable[..., Base], services: Services
) -> None:
    config, weights = uploadable_adapter(LORA, base)
    wider = {name: [2 * width for width in shape] for name, shape in TARGETS.items()}
    publish_base(hash="larger", num_layers=3, targets=wider)
    error = refused(send(alice, config, weights), "adapter_does_not_fit", "weights", services)
    assert "4 missing, 8 of another shape" in error["message"]


class Canary:
    """Would run as code if somebody unpickled it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was read",))


@pytest.mark.parametrize("kind", ["zip", "pickle", "name"])
def test_a_pickle_is_refused_with_the_line_that_converts_it(
    kind: str, alice: Caller, base: Base, services: Services
) -> None:
    config, _ = uploadable_adapter(LORA, base)
    pickled = pickle.dumps(Canary())
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickled)
    name, content = {
        "zip": (WEIGHTS, archive.getvalue()),
        "pickle": (WEIGHTS, pickled),
        "name": ("adapter_model.BIN", b"\x00" * 64),
    }[kind]
    error = refused(send(alice, config, content, name), "pickle_refused", "weights", services)
    assert "save_file(" in error["message"]


@pytest.mark.parametrize(
    ("config", "code"),
    [
        (b"{", "invalid_adapter_config"),
        (b"[]", "invalid_adapter_config"),
        (b"\xff", "invalid_adapter_config"),
        (b'{"r": NaN}', "invalid_adapter_config"),
        (b'{"peft_type": "LORA\\u0000"}', "invalid_adapter_config"),
        (b" " * (2**20 + 1), "invalid_adapter_config"),
        (b"{}", "unsupported_adapter_field"),
    ],
)
def test_a_config_that_is_none_is_refused(config: bytes, code: str, alice: Caller, services: Services) -> None:
    refused(send(alice, config, b""), code, "config" if code[0] == "i" else "config.peft_type", services)


def test_broken_weights_and_parts_are_refused(alice: Caller, base: Base, services: Services) -> None:
    config, weights = uploadable_adapter(LORA, base)
    refused(send(alice, config, weights[:-1]), "invalid_safetensors", "weights", services)
    infinite = load(weights)
    next(iter(infinite.values()))[0, 0] = np.inf
    error = refused(send(alice, config, save(infinite)), "invalid_safetensors", "weights", services)
    assert "not a number" in error["message"]
    refused(send(alice, config, weights, owner="me"), "unknown_field", "owner", services)
    refused(send(alice, config, weights, name="a\0b"), "invalid_request", "name", services)
    parts = {"config": ("c", json.dumps(config)), "weights": ("w", weights)}
    for missing in parts:
        files = {part: file for part, file in parts.items() if part != missing}
        refused(alice.post("/adapters", files=files), "missing_field", missing, services)
    as_text = alice.post("/adapters", files={"weights": parts["weights"]}, data={"config": json.dumps(config)})
    refused(as_text, "missing_field", "config", services)
    refused(alice.post("/adapters", json=config), "unsupported_media_type", None, services, 415)


def test_an_upload_has_a_largest_size_which_is_not_that_of_data_sets(
    alice: Caller, base: Base, services: Services
) -> None:
    services.settings.max_adapter_mib = 1
    config, weights = uploadable_adapter({**LORA, "rank": 32, "target_modules": list(TARGETS)}, base)
    refused(send(alice, config, weights + bytes(3 * 2**20)), "adapter_too_large", "weights", services, 413)
    assert send(alice, config, weights).status_code == 201


@pytest.mark.parametrize("name", ["../../mixloom.db", "/etc/passwd", "adp_1", "CON", "a\\b"])
def test_a_files_name_is_no_path(name: str, alice: Caller, base: Base, services: Services) -> None:
    config, weights = uploadable_adapter(LORA, base)
    made = send(alice, config, weights, name).json()
    folder = services.store.path(f"uploads/{made['id']}")
    assert {path.name for path in folder.iterdir()} == {"README.md", "adapter_config.json", WEIGHTS}
    assert services.store.list("uploads") == [f"uploads/{made['id']}"]


def test_a_named_upload_can_be_found(alice: Caller, base: Base) -> None:
    made = send(alice, *uploadable_adapter(LORA, base), name="mine").json()
    assert [one["id"] for one in alice.get("/adapters", params={"name": "mine"}).json()["data"]] == [made["id"]]
