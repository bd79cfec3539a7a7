"""When memory runs out: how it is recognised, and what the next passes may hold."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from server.daemon.memory import bytes_asked, is_out_of_memory
from server.daemon.pass_limit import FIRST_PATIENCE, PassLimit


def test_what_torch_and_numpy_say_is_recognised_with_the_bytes() -> None:
    with pytest.raises(RuntimeError) as torchs:
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(MemoryError) as numpys:
        np.empty(2**60, np.uint8)
    cuda = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.50 MiB. GPU 0 has a total capacity of 79 GiB."
    )
    for error, asked in ((torchs.value, 2**60), (numpys.value, 2**60), (cuda, 20.5 * 2**20), (MemoryError(), None)):
        assert is_out_of_memory(error)
        assert bytes_asked(error) == asked
    for other in (RuntimeError("index out of range"), ValueError("allocate 3 bytes"), IndexError()):
        assert not is_out_of_memory(other)


def test_a_limit_is_half_of_what_did_not_fit_until_that_fits_too() -> None:
    limit = PassLimit()
    assert limit.tokens == math.inf
    for tokens, half in ((1000, 500), (500, 250), (3, 1), (1, 1)):
        limit.failed(tokens)
        assert limit.tokens == half


def test_a_larger_pass_is_tried_again_ever_more_rarely() -> None:
    limit, waited = PassLimit(), []
    for _ in range(3):
        limit.failed(1000)
        count = 0
        while limit.tokens == 500:
            limit.fitted()
            count += 1
        assert limit.tokens == 1000
        waited.append(count)
    assert waited == [2 * FIRST_PATIENCE, 4 * FIRST_PATIENCE, 8 * FIRST_PATIENCE]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")
def test_a_pass_that_really_runs_out_of_memory_leaves_the_engine_fit_for_smaller_ones_with_the_same_bits() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.server.daemon.cramped"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.split("\n")[:2] == ["out of memory", "True"], done.stdout + done.stderr
