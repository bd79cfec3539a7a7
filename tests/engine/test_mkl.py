"""Intel's matmuls in the mode that keeps bits."""

import os
import subprocess
import sys

import pytest
import torch

from engine import exactness, mkl
from engine.base_model import Fingerprint
from tests.engine.test_lanes import wide_base
from tests.models import tiny_base


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_at_the_widths_of_a_real_model_a_row_has_the_same_bits_in_any_company(threads: int) -> None:
    assert exactness.failing_facts(wide_base(torch.float32)) == []


@pytest.mark.parametrize("set_by_operator", [None, "COMPATIBLE"])
def test_the_mode_is_set_on_intel_alone_and_what_the_operator_has_set_stays(set_by_operator: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    if set_by_operator is not None:
        environment["MKL_CBWR"] = set_by_operator
    show = [sys.executable, "-c", "from engine import mkl; print(mkl.mode())"]
    shown = subprocess.run(show, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert shown == (set_by_operator or ("AUTO,STRICT" if mkl.is_intel() else ""))


def test_a_fingerprint_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    monkeypatch.setenv("MKL_CBWR", "AVX2,STRICT")
    assert Fingerprint.of(tiny_base()).capability == f"{capability}, MKL AVX2,STRICT"
    monkeypatch.delenv("MKL_CBWR")
    assert Fingerprint.of(tiny_base()).capability == capability
