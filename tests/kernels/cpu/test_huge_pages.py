"""Packed weights and large outputs lie on huge pages where the system has them; contents stay as they were."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify.kernels.cpu import pages
from sparsify.kernels.cpu.library import available

MIB = 1 << 20


def huge_bytes(tensor: Tensor) -> int:
    """Return the bytes of huge pages in the mappings that hold a tensor."""
    total, inside = 0, False
    first, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) < end and first < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.fixture
def collapsing() -> None:
    """Skip where the system does not move memory to huge pages when asked to."""
    if pages._madvise is None:
        pytest.skip("no transparent huge pages in this system, or its setting is never")
    tensor = torch.ones(8 * MIB // 4)
    pages.use_huge_pages([tensor])
    if not huge_bytes(tensor):
        pytest.skip("this system gave no huge page: before Linux 6.1, or no free memory in one piece")


@pytest.mark.skipif(not available(), reason="no native library")
def test_packed_weights_and_their_copies_lie_on_huge_pages(collapsing: None) -> None:
    masked = sparsify.prune(sparsify.convert(nn.Linear(2048, 2048)), 0.3, method="random", seed=0)
    layer = sparsify.export(masked.eval(), format="bitmask")
    x = torch.randn(1, 2048)
    torch.testing.assert_close(layer(x), masked(x))
    for each in (layer, copy.deepcopy(layer)):
        assert huge_bytes(each.values) >= 4 * MIB
        assert torch.equal(each(x), layer(x))


@pytest.mark.skipif(not available(), reason="no native library")
@pytest.mark.parametrize("form", ["panel", "gather"])
def test_large_outputs_come_on_huge_pages(form: str, collapsing: None) -> None:
    masked = sparsify.prune(sparsify.convert(nn.Linear(8, 4096)), 0.5, method="random", seed=0)
    layer = sparsify.export(masked.eval(), format=form)
    with torch.inference_mode():
        y = layer(torch.ones(4096, 8))
    assert huge_bytes(y) >= 4 * MIB, "of 64 MiB: a system may run out of free memory in one piece"


@pytest.mark.parametrize("n", [0, 1, 2 * MIB - 1, 2 * MIB, 4 * MIB + 3, 9 * MIB + 1])
def test_contents_stay(n: int) -> None:
    whole = torch.randint(0, 256, (n + 5,), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    before, at = whole.clone(), whole.data_ptr()
    pages.use_huge_pages([whole[3 : 3 + n], whole])
    assert whole.data_ptr() == at
    assert torch.equal(whole, before)


def test_other_devices_and_subclasses_are_left_alone() -> None:
    pages.use_huge_pages([torch.empty(4 * MIB, device="meta"), nn.Parameter(torch.ones(MIB))])


def test_the_setting_never_is_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in (None, "always madvise [never]"):
        setting = tmp_path / "enabled"
        if text is not None:
            setting.write_text(text)
        monkeypatch.setattr(pages, "_SETTING", setting)
        assert pages._find_madvise() is None
