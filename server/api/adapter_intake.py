"""From an upload to a kept adapter: config read, header compared with the base, values checked, all published.

Runs in a worker thread. Nothing that was sent is executed, unpacked or made into a path.
"""

import json
import time
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pydantic import AfterValidator
from starlette.datastructures import FormData, UploadFile

from server import strict_json
from server.adapter_files import CARD, CONFIG, WEIGHTS
from server.adapter_files.config import disk_config, read_config
from server.adapter_files.layout import refuse_unfit, tensor_shapes
from server.adapter_files.safetensors import Stored, read_header, write_float32
from server.api.deps import Tenant
from server.api.schemas import Name, StrictModel, validated
from server.api.services import Services
from server.db import adapters
from server.db.bases import current_base
from server.db.tables import Adapter, Base
from server.errors import MixloomError
from server.ids import new_id
from server.settings import MIB, Settings
from server.store import manifest

MAX_CONFIG_BYTES = MIB
CONVERSION = (
    'python -c "import torch; from safetensors.torch import save_file; '
    "save_file({k: v.clone().contiguous() for k, v in torch.load('adapter_model.bin', map_location='cpu', "
    "weights_only=True).items()}, 'adapter_model.safetensors')\""
)
"""From a pickle to safetensors, on the machine of whoever trusts it."""
_PICKLES = (b"PK\x03\x04", b"\x80")  # torch's zip, and the first byte of pickle's protocols
_PICKLE_NAMES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def _storable(text: str) -> str:
    if flaw := strict_json.flaw(text):
        raise ValueError(f"it {flaw}")
    return text


class AdapterOptions(StrictModel):
    """What may be said of an adapter beside its two files."""

    name: Annotated[Name, AfterValidator(_storable)] = "upload"


REQUEST_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["config", "weights"],
                "properties": {
                    "config": {
                        "type": "string",
                        "format": "binary",
                        "description": "adapter_config.json, of HF PEFT (LoRA, DoRA) or of the package mixlora.",
                    },
                    "weights": {
                        "type": "string",
                        "format": "binary",
                        "description": "adapter_model.safetensors in float32, float16 or bfloat16; no pickle.",
                    },
                    "name": {"type": "string", "description": "Default `upload`."},
                },
            }
        }
    },
}
"""Of `POST /adapters`, for OpenAPI."""


def refuse_too_large(settings: Settings, num_bytes: int) -> None:
    """Raises 413 `adapter_too_large` for more bytes than an upload may have."""
    if num_bytes > settings.max_adapter_mib * MIB:
        raise MixloomError(
            "adapter_too_large",
            f"An adapter may have {settings.max_adapter_mib} MiB; this has {num_bytes / MIB:.1f}. Save it in "
            "bfloat16, or ask the operator for a larger max_adapter_mib.",
            413,
            "weights",
        )


def keep_adapter(services: Services, tenant: Tenant, form: FormData) -> tuple[Adapter, list[str]]:
    """Keep an uploaded adapter that fits the base in force; what its owner should know about it.

    Raises what `read_config` and `refuse_unfit` do, `pickle_refused`, `invalid_safetensors`, and for the fields.
    """
    config, weights = _file(form, "config"), _file(form, "weights")
    refuse_too_large(services.settings, weights.size or 0)
    options = validated(
        AdapterOptions, {name: value for name, value in form.items() if name not in ("config", "weights")}
    )
    with services.database.read() as session:
        base = current_base(session)
    values = _json(config)
    adapter = read_config(values, base)
    expected = tensor_shapes(adapter, base)
    stored = _header(weights, 2**16 + 512 * len(expected))
    refuse_unfit({name: one.shape for name, one in stored.items()}, expected, base)
    said = values.get("base_model_name_or_path")
    row = _publish(services, tenant, options.name, base, adapter, said, weights.file, stored)
    return row, _notes(said, base)


def _publish(
    services: Services,
    tenant: Tenant,
    name: str,
    base: Base,
    adapter: dict[str, Any],
    said: Any,
    weights: BinaryIO,
    stored: dict[str, Stored],
) -> Adapter:
    """The files in the store, then the row that names them."""
    id_ = new_id("adp")
    key = f"uploads/{id_}"  # in `adapters` is what the daemon writes

    def write(folder: Path) -> None:
        try:
            write_float32(weights, stored, folder / WEIGHTS)
        except ValueError as error:
            raise _invalid(str(error)) from None
        (folder / CONFIG).write_text(json.dumps(disk_config(adapter, base), indent=2, sort_keys=True) + "\n")
        (folder / CARD).write_text(_card(name, base, adapter, said))

    kept = manifest(services.store.put(key, write))
    row = Adapter(
        id=id_,
        tenant_id=tenant.tenant_id,
        name=name,
        job_id=None,
        step=0,
        final=True,
        base_name=base.name,
        base_hash=base.hash,
        method=adapter["method"],
        config=adapter,
        valid_loss=None,
        exact=True,
        key=key,
        created_at=time.time(),
        manifest=kept,
        **kept[WEIGHTS],
    )
    with services.naming(key, tenant.tenant_id) as session:
        adapters.add_adapter(session, row)
    return row


def _file(form: FormData, part: str) -> UploadFile:
    upload = form.get(part)
    if isinstance(upload, UploadFile):
        return upload
    name = CONFIG if part == "config" else WEIGHTS
    raise MixloomError("missing_field", f"'{part}' is required: send {name} as a file part.", param=part)


def _json(upload: UploadFile) -> dict[str, Any]:
    """The object in an uploaded file of JSON. Raises `invalid_adapter_config`."""
    problem = f"has more than {MAX_CONFIG_BYTES // MIB} MiB"
    if (upload.size or 0) <= MAX_CONFIG_BYTES:
        try:
            value = strict_json.parse(upload.file.read().decode())
            problem = strict_json.flaw(value) or ("" if isinstance(value, dict) else "is no JSON object")
        except UnicodeDecodeError:
            problem = "is not UTF-8"
        except ValueError as error:
            problem = str(error)
    if problem:
        raise MixloomError("invalid_adapter_config", f"'config' {problem}. Send {CONFIG} as it is.", param="config")
    return dict(value)


def _header(upload: UploadFile, max_bytes: int) -> dict[str, Stored]:
    """What an uploaded file holds. Raises `pickle_refused`, `invalid_safetensors`."""
    try:
        return read_header(upload.file, max_bytes)
    except ValueError as error:
        upload.file.seek(0)
        is_pickle = upload.file.read(4).startswith(_PICKLES)
        if not is_pickle and not (upload.filename or "").lower().endswith(_PICKLE_NAMES):
            raise _invalid(str(error)) from None
        raise MixloomError(
            "pickle_refused",
            f"'weights' is a pickle, which can run code of whoever wrote it, and is never read here. Where you trust "
            f"it, convert it and send {WEIGHTS}: {CONVERSION}",
            param="weights",
        ) from None


def _invalid(problem: str) -> MixloomError:
    message = f"'weights' is not the safetensors file that it should be: {problem}. Save it again, and send {WEIGHTS}."
    return MixloomError("invalid_safetensors", message, 422, "weights")


def _notes(said: Any, base: Base) -> list[str]:
    """Another name may well be the same base under its name on the hub: only shapes can be compared."""
    if said in (None, "", base.name, base.hash):
        return []
    return [
        f"The adapter says that its base is '{said}'; here it runs on '{base.name}', whose shapes fit. Whether the two "
        "are the same model is for you to know."
    ]


def _card(name: str, base: Base, adapter: dict[str, Any], said: Any) -> str:
    return f"""# {name}

A {adapter["method"]} adapter that was uploaded to Mixloom.

- base: {base.name} (sha256 {base.hash})
- the base that it names: {json.dumps(said)}

Adapter: `{json.dumps(adapter, sort_keys=True)}`
"""
