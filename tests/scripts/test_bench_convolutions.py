"""The benchmark of convolutions: every peer computes the same layer, and the table has a line for each layout."""

import pytest
from benchmarks import convolutions, tables
from tested_kernels import needs_native

pytestmark = pytest.mark.usefixtures("one_thread")


@needs_native
@pytest.mark.filterwarnings("ignore::sparsify.LeftDenseWarning")
def test_rows_and_table_of_a_small_convolution():
    grid = convolutions.chosen(True, sparsities=[0.5], rounds=1, cases=[(4, 5)], images=[2])
    rows = list(convolutions.run(grid))
    names = [row["candidate"] for row in rows]
    assert names[-2:] == ["sparsify channels first", "sparsify channels last"]
    assert {"torch channels first", "torch channels last"} <= set(names)
    assert all(row["form"] in ("dense", "panel") for row in rows[-2:])
    record = {"benchmark": "convolutions", "machine": {"isa": "avx512"}, "rows": rows}
    (title, lines), *_ = tables.tables(record).items()
    assert title.startswith("3x3 convolutions")
    assert [line[0] for line in lines[1:3]] == ["4, 5x5, 2"] * 2
    assert len({len(line) for line in lines}) == 1
