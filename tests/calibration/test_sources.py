"""Several sources of calibration data have equal parts, evenly spread."""

import pytest
import torch

from sparsify import mix_data


def batches(source: int, *sizes: int) -> list[torch.Tensor]:
    """Return batches whose values tell the source and the number of the batch."""
    return [torch.full((size, 1), source + number / 100) for number, size in enumerate(sizes)]


def shares(mixed: list[torch.Tensor]) -> dict[int, int]:
    found: dict[int, int] = {}
    for batch in mixed:
        source = int(batch[0, 0])
        found[source] = found.get(source, 0) + len(batch)
    return found


def test_each_source_has_as_many_samples_as_the_smallest() -> None:
    mixed = mix_data({"a": batches(1, *[4] * 50), "b": iter(batches(2, *[2] * 10)), "c": batches(3, *[5] * 9)})
    assert shares(mixed) == {1: 20, 2: 20, 3: 20}
    numbers = [round(100 * float(batch[0, 0] - 1)) for batch in mixed if int(batch[0, 0]) == 1]
    assert numbers == sorted(numbers)
    assert numbers[-1] - numbers[0] > 35  # from all over the source
    assert [int(batch[0, 0]) for batch in mixed[:6]] == [2, 1, 3, 2, 2, 1]  # in turns


def test_samples_are_shared_and_a_source_with_less_is_named() -> None:
    assert shares(mix_data({"a": batches(1, *[3] * 30), "b": batches(2, *[1] * 30)}, 24)) == {1: 12, 2: 12}
    with pytest.warns(UserWarning, match="source 'b' has 5 samples, less than its share of 12"):
        assert shares(mix_data({"a": batches(1, *[3] * 30), "b": batches(2, 5)}, 24)) == {1: 12, 2: 5}


def test_dicts_and_tuples_have_samples_too() -> None:
    mixed = mix_data({"a": [{"ids": torch.ones(2, 3)}] * 4, "b": [("text", torch.ones(4, 3))] * 4})
    assert [type(batch) for batch in mixed].count(dict) == 4
    assert len(mixed) == 6


def test_what_cannot_be_is_an_error() -> None:
    with pytest.raises(ValueError, match="source 'b' is empty; a generator that was read before"):
        mix_data({"a": batches(1, 2), "b": []})
    with pytest.raises(ValueError, match="no source of calibration data"):
        mix_data({})
    with pytest.raises(ValueError, match="samples=1 is less than one of each of 2 sources"):
        mix_data({"a": batches(1, 2), "b": batches(2, 2)}, 1)
