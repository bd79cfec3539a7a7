"""The benchmark measures every operation that has a price."""

import json
from pathlib import Path

from benchmarks.costs import METHODS, main
from tests.base_folder import write_tiny_base


def test_one_command_sets_what_each_operation_takes_against_what_it_costs(tmp_path: Path):
    base = write_tiny_base(tmp_path / "base")
    report_file = tmp_path / "costs.json"
    assert main(["--base", str(base), "--dtype", "float32", "--repeats", "1", "--json", str(report_file)]) == 0
    rows = json.loads(report_file.read_text())["rows"]
    assert [row["method"] for row in rows] == [name for name in METHODS for _ in range(8)]
    assert len({row["operation"] for row in rows}) == 8
    assert all(row["costs"] > 0 for row in rows)
    by_name = {row["operation"]: row for row in rows if row["method"] == "lora"}
    assert by_name["a token sampled"]["costs"] > by_name["a token sampled, 8 at once"]["costs"]
