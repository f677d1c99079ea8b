"""The errors of layers, of pruning and of rounding, in a file: kept, listed, shown on the page, and hashed."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from forged_files import File
from torch import nn

import sparsify
from sparsify import CheckpointError
from sparsify.layers.records import Rounding, rounding_of, set_rounding
from sparsify.reporting.file_facts import file_facts
from sparsify.reporting.page import page
from sparsify.reporting.report import Row


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 16), nn.Linear(16, 8))


def pruned() -> nn.Module:
    data = [torch.randn(40, 32, generator=torch.Generator().manual_seed(1))]
    model = sparsify.convert(net(), exclude="3")
    return sparsify.prune(model, 0.5, method="wanda", data=data)


def errors(rows: Iterable[Row]) -> list[tuple[str, float | None, float | None]]:
    return [(row.name, row.error, row.int8_error) for row in rows]


@pytest.mark.parametrize("quantize", [None, "int8", "int8-weights"])
def test_errors_are_kept_and_listed(quantize: str | None, tmp_path: Path) -> None:
    example = {} if quantize is None else {"example": torch.randn(9, 32)}
    fast = sparsify.export(pruned(), format="csr", quantize=quantize, **example)
    expected = errors(sparsify.report(fast))
    assert all(0 < error < 1 for _, error, _ in expected[:2])
    assert [error is None for _, _, error in expected[:2]] == [quantize is None] * 2
    path = tmp_path / "a.safetensors"
    sparsify.save(fast, path)
    assert errors(sparsify.report(sparsify.load(path, net()))) == expected
    assert errors(sparsify.inspect(path)) == expected[:2]
    text = page(file_facts(path))
    assert f"<td>{expected[0][1]:.4f}</td>" in text
    assert ("int8 error" in text) == (quantize is not None)


def test_a_masked_model_keeps_its_errors_in_a_file_and_as_dense(tmp_path: Path) -> None:
    model = pruned()
    expected = errors(sparsify.report(model))
    sparsify.save(model, tmp_path / "a.safetensors")
    assert errors(sparsify.report(sparsify.load(tmp_path / "a.safetensors", net()))) == expected
    sparsify.save(sparsify.to_dense(model), tmp_path / "b.safetensors")
    assert errors(sparsify.report(sparsify.load(tmp_path / "b.safetensors", net()))) == expected
    sparsify.save(sparsify.prune(sparsify.convert(net()), 0.5), tmp_path / "c.safetensors")  # without data
    assert set(File((tmp_path / "c.safetensors").read_bytes()).metadata) == {"format", "sparsify", "sha256"}


def test_a_number_that_is_not_finite_stays(tmp_path: Path) -> None:
    model = sparsify.export(pruned(), format="csr")
    rounding = Rounding(0.1, None, math.inf, True)
    set_rounding(model[0], rounding)
    model[0].pruning_result = dataclasses.replace(model[0].pruning_result, error=math.nan)
    sparsify.save(model, tmp_path / "a.safetensors")
    metadata = File((tmp_path / "a.safetensors").read_bytes()).metadata
    assert json.loads(metadata["records"], parse_constant=pytest.fail)["0"]["error"] == "NaN"
    loaded = sparsify.load(tmp_path / "a.safetensors", net())
    assert rounding_of(loaded[0]) == rounding
    assert math.isnan(loaded[0].pruning_result.error)


def test_altered_errors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    sparsify.save(sparsify.export(pruned(), format="csr"), path)
    raw = path.read_bytes()
    before = net()

    def refused(file: File, message: str) -> None:
        path.write_bytes(file.bytes())
        model = net()
        with pytest.raises(CheckpointError, match=message):
            sparsify.load(path, model)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))

    def with_records(text: str) -> File:
        file = File(raw)
        file.metadata |= {"records": text, "records_sha256": hashlib.sha256(text.encode()).hexdigest()}
        return file

    for key in ("records", "records_sha256"):
        file = File(raw)
        del file.metadata[key]
        refused(file, "records of its layers were altered")
    file = File(raw)
    file.metadata["records"] = file.metadata["records"].replace('"0"', '"1"')
    refused(file, "records of its layers were altered")
    refused(with_records('{"7": {"error": 0.5}}'), "the file has an error of '7', which is no layer of the model")
    refused(with_records('{"0": {"error": 0.5, "eror": 1}}'), r"the header is wrong at 0\.")
    refused(with_records('{"0": 3}'), "the header is wrong at 0")
    refused(with_records("{"), "the header is")
    file = File(raw)
    file.header["records"] = {}
    refused(file, "`records` is an entry beside it")
    path.write_bytes(with_records("{}").bytes())
    assert [row.error for row in sparsify.inspect(path)] == [None, None]
