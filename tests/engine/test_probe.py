"""What is measured of the machine is of a kind that it can be."""

import torch

from engine.probe import ROWS, fewest_rows, gigaflops
from tests.models import tiny_base


def test_the_smallest_gang_is_a_number_of_rows_up_to_the_most_that_is_allowed() -> None:
    assert fewest_rows(tiny_base(), 320) in [rows for rows in ROWS if rows <= 320]
    assert fewest_rows(tiny_base(), 50) == 50


def test_a_speed_is_that_of_a_computer() -> None:
    assert 0.01 < gigaflops(torch.float32, "cpu") < 1e6
