"""The README.md of an adapter: what it is, what it was made from, and how a prompt to it looks."""

import json

import numpy as np

from engine.base_model import Fingerprint
from server.db.tables import Job
from server.render import Renderer


def model_card(
    renderer: Renderer,
    job: Job,
    row: np.ndarray,
    *,
    step: int,
    valid_loss: float | None,
    fingerprint: Fingerprint,
) -> str:
    """Markdown without times or ids: the same job gives the same text. `row` is one that it trained on."""
    start = "" if job.init_from is None else f"\n- starts from: adapter with sha256 {job.init_from['sha256']}"
    validation = "" if valid_loss is None else f"\n- validation loss: {valid_loss:.6f}"
    return f"""# {job.name}

A {job.adapter["method"]} adapter trained with Mixloom.

- base: {job.base_name} (sha256 {job.base_hash}), computed in {fingerprint.dtype}{start}
- data: sha256 {job.dataset_sha256}{_parts(job)}
- chat template: sha256 {renderer.template_sha256}
- optimizer steps: {step} of {job.total_steps}{validation}

Adapter: `{json.dumps(job.adapter, sort_keys=True)}`

Training: `{json.dumps(job.training, sort_keys=True)}`

One training row, as the model saw it:

```
{renderer.decode(row.tolist())}
```
"""


def _parts(job: Job) -> str:
    """A line for each data set of a mixture."""
    return "".join(
        f"\n  - sha256 {part['sha256']}, weight {part['weight']:g}: {part['rows']} rows, "
        f"{part['epoch_rows']} in an epoch"
        for part in job.mixture or ()
    )
