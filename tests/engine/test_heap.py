"""Memory that a pass gives back is there for the next one."""

import subprocess
import sys

FAULTS_OF_A_LATER_PASS = """
import resource, sys, torch
from engine import heap

if sys.argv[1] == "keep":
    heap.keep_freed()

def use():
    tensors = [torch.empty(n * 2**20, dtype=torch.uint8).fill_(1) for n in (100, 20, 200)]

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(12):
    use()
before = faults()
use()
print(faults() - before)
"""
PAGES = 320 * 256
"""Of what the script uses at once. The heap grows a little until all finds its place: hence not the second time."""


def faults(heap: str) -> int:
    command = [sys.executable, "-c", FAULTS_OF_A_LATER_PASS, heap]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_a_pass_like_those_before_it_asks_the_system_for_no_page() -> None:
    assert faults("keep") < PAGES / 50 < PAGES / 5 < faults("as it is")
