"""sparsify bench: a model against its sparse copy and other dense engines, and the inputs it is measured on."""

import copy
import json

import pytest
import torch
from torch import nn

from sparsify.cli import main
from sparsify.cli.model_inputs import check_inputs, make_inputs
from sparsify.reporting.model_bench import bench, typical_tokens

pytestmark = pytest.mark.usefixtures("one_thread")


class Small(nn.Module):
    """Two Linears of different work, on 4 rows per input for the second."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow, self.unused = nn.Linear(64, 96), nn.Linear(24, 8), nn.Linear(4, 4)

    def forward(self, x):
        return self.narrow(self.wide(x).reshape(-1, 4, 24))


def small():
    torch.manual_seed(0)
    return Small().eval()


def small_inputs():
    return {"x": torch.randn(2, 64)}


def test_bench_compares_a_model_with_its_sparse_copy():
    model = small()
    before = copy.deepcopy(model.state_dict())
    result = bench(model, (torch.randn(6, 64),), 0.9, rounds=3)
    assert result.tokens == 6
    assert {x.name: x.tokens for x in result.layers} == {"wide": 6, "narrow": 24, "unused": None}
    assert [x.dense_us is None for x in result.layers] == [False, False, True]
    assert f"{result.speedup:.2f}x dense at sparsity 0.9" in str(result)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_typical_tokens_are_those_of_most_of_the_work():
    assert typical_tokens(small(), (torch.randn(3, 64),)) == 3
    with pytest.raises(ValueError, match="none of its Linears"):
        typical_tokens(nn.ReLU(), (torch.randn(3),))


def test_bench_command(capsys):
    spec = f"{__name__}:small"
    assert main(["bench", "--model", spec, "--shape", "64", "--batch", "5", "--json", "--threads", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == 5
    assert result["dense"]["median_s"] / result["sparse"]["median_s"] == pytest.approx(result["speedup"])
    assert main(["bench", "--model", spec, "--inputs", f"{__name__}:small_inputs", "--sparsity", "0.5"]) == 0
    assert "x dense at sparsity 0.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "cannot be guessed; give --shape"),
        (("--shape", "3"), "does not run on inputs of 1x3"),
        (("--seq", "3"), "has no nn.Embedding"),
        (("--seq", "3", "--shape", "64"), "give one of them"),
        (("--shape", "64", "--batch", "0"), "must be positive"),
        (("--shape", "64", "--sparsity", "1.5"), "between 0 and 1"),
        (("--shape", "64", "--threads", "0"), "at least 1"),
        (("--inputs", "nowhere:f"), "write package.module:function"),
        (("--inputs", f"{__name__}:small_inputs", "--batch", "2"), "no effect beside --inputs"),
    ],
)
def test_bench_command_says_what_is_wrong(options, message, capsys):
    assert main(["bench", "--model", f"{__name__}:small", *options]) == 2
    assert message in capsys.readouterr().err


def test_inputs_are_guessed_from_the_kind_of_model():
    images = make_inputs(nn.Identity(), "torchvision:any", batch=2)
    assert images[0].shape == (2, 3, 224, 224)
    text = nn.Sequential(nn.Embedding(50, 8), nn.Embedding(7, 8))
    ids = make_inputs(text, "hf:folder", batch=2)["input_ids"]
    assert ids.shape == (2, 128)
    assert int(ids.max()) < 7
    check_inputs(nn.Embedding(9, 2), "my:model", make_inputs(nn.Embedding(9, 2), "my:model", seq=4))
