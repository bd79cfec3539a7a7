"""An adapter's files as the API knows them: names, shapes and config, without the engine and without a tensor.

`tests/server/daemon/test_uploads.py` holds this to what the engine writes.
"""

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
CARD = "README.md"
