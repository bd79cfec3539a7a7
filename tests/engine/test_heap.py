"""Memory that a pass gives back is there for the next one."""

import subprocess
import sys

FAULTS_OF_A_LATER_PASS = """
import resource, torch
from engine import heap

def use():
    tensors = [torch.empty(n * 2**20, dtype=torch.uint8).fill_(1) for n in (50, 10, 100)]

def faults_of_the_last(times):
    for _ in range(times):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        use()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults_of_the_last(2))
heap.keep_freed()
print(faults_of_the_last(12))
"""
PAGES = 160 * 256
"""Of what the script uses at once. The heap grows a little until all finds its place: hence not the second time."""


def test_a_pass_like_those_before_it_asks_the_system_for_no_page() -> None:
    command = [sys.executable, "-c", FAULTS_OF_A_LATER_PASS]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    as_it_is, kept = map(int, said.split())
    assert kept < PAGES / 50 < PAGES / 5 < as_it_is
