"""The smallest gang is measured, on the base that is served."""

from engine.base_model import BaseModel
from server.daemon.fill_min import ROWS, measure_fill_min


def test_it_is_a_number_of_rows_up_to_the_most_that_is_allowed(frozen: BaseModel) -> None:
    assert measure_fill_min(frozen, 320) in [rows for rows in ROWS if rows <= 320]
    assert measure_fill_min(frozen, 50) == 50
