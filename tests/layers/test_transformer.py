"""torch's transformers, converted and exported: the outputs they had, in training and inference, padded or not."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify import SparseLinear
from sparsify.layers import UnfusedAttention, UnfusedEncoder

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but:UserWarning"),
]

EMBED, HEADS, HIDDEN = 8, 2, 16

#: Two or four layers of sums of at most HIDDEN + EMBED terms about 1, in float64, each passed on by a norm that may
#: enlarge an error a few times.
TOLERANCE = 1e4 * HIDDEN * torch.finfo(torch.float64).eps

SOURCE = torch.randn(3, 5, EMBED, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TARGET = torch.randn(3, 4, EMBED, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 2 + [True] * 3])
PADDED_LEFT = PADDED.flip(1)
CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gelu": {"activation": "gelu"},
    "silu": {"activation": nn.SiLU()},
    "norm first": {"norm_first": True},
    "no bias": {"bias": False},
    "sequence first": {"batch_first": False},
    "odd heads": {"nhead": 1},
}
INPUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"src_key_padding_mask": PADDED},
    "padding on the left": {"src_key_padding_mask": PADDED_LEFT},
    "float padding": {"src_key_padding_mask": torch.zeros(3, 5, dtype=torch.float64).masked_fill(PADDED, -torch.inf)},
    "mask": {"mask": CAUSAL},
    "causal": {"mask": CAUSAL, "is_causal": True},
    "both": {"mask": CAUSAL, "src_key_padding_mask": PADDED},
}


def encoder(norm: bool = False, seed: int = 0, **options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(seed)
    options = {"nhead": HEADS, "batch_first": True, "dropout": 0.0, "dtype": torch.float64, **options}
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(EMBED, dim_feedforward=HIDDEN, **options),
        2,
        nn.LayerNorm(EMBED, dtype=torch.float64) if norm else None,
    )
    for parameter in model.parameters():  # the layers are copies of one, and biases start as zeros
        nn.init.normal_(parameter, std=0.5)
    return model


def each_way(model: nn.Module) -> Iterator[None]:
    """Run what follows in training, in inference with gradients, and in inference without."""
    for training, grad in ((True, True), (False, True), (False, False)):
        model.train(training)
        with torch.set_grad_enabled(grad):
            yield


def assert_same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_encoder(layer: str, norm: bool) -> None:
    """Converted, the outputs stay, also where the padding is; pruned, exported and masked are one."""
    dense = encoder(norm, **LAYERS[layer])
    sparse = sparsify.convert(copy.deepcopy(dense))
    pruned = sparsify.prune(copy.deepcopy(sparse), 0.5)
    fast, masked = sparsify.export(pruned, format="csr"), sparsify.to_dense(copy.deepcopy(pruned))
    assert type(masked) is nn.TransformerEncoder
    assert type(masked.layers[0].self_attn) is nn.MultiheadAttention
    source = SOURCE if LAYERS[layer].get("batch_first", True) else SOURCE.transpose(0, 1)
    n_compared = 0
    for arguments in INPUTS.values():
        for _ in each_way(nn.ModuleList([dense, sparse, pruned, fast, masked])):
            assert_same(sparse(source, **arguments), dense(source, **arguments))
            for one in (pruned, fast):
                assert_same(one(source, **arguments), masked(source, **arguments))
            n_compared += 1
    assert n_compared == 3 * len(INPUTS)


def test_padding_comes_out_as_torchs_fused_inference_leaves_it() -> None:
    for norm in (False, True):
        dense = encoder(norm).eval()
        sparse = sparsify.convert(copy.deepcopy(dense))
        with torch.no_grad():
            blank = dense(SOURCE, src_key_padding_mask=PADDED)[PADDED]
            assert_same(blank, torch.zeros_like(blank) if dense.norm is None else dense.norm(torch.zeros_like(blank)))
            assert torch.equal(sparse(SOURCE, src_key_padding_mask=PADDED)[PADDED], blank)
        assert not torch.allclose(sparse(SOURCE, src_key_padding_mask=PADDED)[PADDED], blank)  # not with gradients


@pytest.mark.parametrize("switch", ["fastpath", "nested", "mask_check"])
def test_the_switches_of_torchs_encoder_still_count(switch: str) -> None:
    dense = encoder().eval()
    if switch == "nested":
        dense.use_nested_tensor = False
    dense.mask_check = switch != "mask_check"
    sparse = sparsify.convert(copy.deepcopy(dense))
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(switch != "fastpath")
    try:
        with torch.no_grad():
            assert_same(sparse(SOURCE, src_key_padding_mask=PADDED), dense(SOURCE, src_key_padding_mask=PADDED))
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)
    assert sparsify.to_dense(sparse).use_nested_tensor == dense.use_nested_tensor


@pytest.mark.parametrize("exported", [False, True])
def test_nested_inputs(exported: bool) -> None:
    nested = torch.nested.as_nested_tensor([row[:n] for row, n in zip(SOURCE, (5, 3, 2), strict=True)])
    dense = encoder().eval()
    sparse = sparsify.convert(copy.deepcopy(dense))
    if exported:
        sparse = sparsify.export(sparse, format="csr")
    with torch.no_grad():
        for ours, theirs in ((sparse, dense), (sparse.layers[0], dense.layers[0])):
            found, wanted = ours(nested), theirs(nested)
            assert found.is_nested
            for one, other in zip(found.unbind(), wanted.unbind(), strict=True):
                assert_same(one, other)


def test_masked_weights_that_an_optimizer_moved_take_no_part_in_inference() -> None:
    model = sparsify.prune(sparsify.convert(encoder()), 0.5).eval()
    with torch.no_grad():
        expected = model(SOURCE), model(SOURCE, src_key_padding_mask=PADDED), model.layers[0](SOURCE)
        for module in model.modules():
            if isinstance(module, SparseLinear):
                module.weight[~module.mask] = 7.0
        found = model(SOURCE), model(SOURCE, src_key_padding_mask=PADDED), model.layers[0](SOURCE)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


class OwnLayer(nn.TransformerEncoderLayer):
    """A subclass, as users write them."""


@pytest.mark.parametrize("exclude", [None, "*self_attn*"])
@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, OwnLayer])
def test_a_layer_whose_linears_alone_convert_reads_no_weight_past_its_mask(
    kind: type[nn.TransformerEncoderLayer], exclude: str | None
) -> None:
    torch.manual_seed(0)
    layer = kind(EMBED, HEADS, HIDDEN, batch_first=True, dtype=torch.float64).eval()
    with torch.no_grad():
        expected = layer(SOURCE)
        model = sparsify.convert(nn.Sequential(layer), exclude=exclude)
        assert_same(model(SOURCE), expected)
        assert isinstance(layer.self_attn, UnfusedAttention)
        assert isinstance(layer.self_attn.in_proj, SparseLinear) == (exclude is None)
        expected = sparsify.prune(model, 0.5)(SOURCE)
        layer.linear1.weight[~layer.linear1.mask] = 7.0
        assert torch.equal(model(SOURCE), expected)
        assert_same(sparsify.to_dense(copy.deepcopy(model))(SOURCE), expected)
    assert type(layer) is kind


def test_decoder_and_transformer() -> None:
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64}
    arguments = [
        {},
        {"tgt_mask": CAUSAL[:4, :4], "tgt_is_causal": True},
        {"memory_key_padding_mask": PADDED, "tgt_key_padding_mask": PADDED[:, :4]},
        {"memory_mask": torch.zeros(4, 5, dtype=torch.bool)},
    ]
    for number, more in enumerate(arguments):
        models: dict[str, nn.Module] = {
            "decoder": nn.TransformerDecoder(
                nn.TransformerDecoderLayer(EMBED, HEADS, HIDDEN, norm_first=number % 2 == 1, **options), 2
            ),
            "transformer": nn.Transformer(EMBED, HEADS, 2, 2, HIDDEN, norm_first=number % 2 == 1, **options),
        }
        for name, dense in models.items():
            first = TARGET if name == "decoder" else SOURCE
            second = SOURCE if name == "decoder" else TARGET
            extra = (
                {"src_key_padding_mask": PADDED} if name == "transformer" and "memory_key_padding_mask" in more else {}
            )
            sparse = sparsify.convert(copy.deepcopy(dense))
            pruned = sparsify.prune(copy.deepcopy(sparse), 0.5)
            fast, masked = sparsify.export(pruned, format="csr"), sparsify.to_dense(copy.deepcopy(pruned))
            for _ in each_way(nn.ModuleList([dense, sparse, pruned, fast, masked])):
                assert_same(sparse(first, second, **more, **extra), dense(first, second, **more, **extra))
                for one in (pruned, fast):
                    assert_same(one(first, second, **more, **extra), masked(first, second, **more, **extra))


def test_dropout_draws_what_torch_draws() -> None:
    dense = encoder(dropout=0.5)
    sparse = sparsify.convert(copy.deepcopy(dense))
    drawn = []
    for one in (sparse, dense):
        torch.manual_seed(3)
        drawn.append(one(SOURCE, src_key_padding_mask=PADDED))
    assert_same(*drawn)


def test_training_and_gradients() -> None:
    dense = encoder()
    sparse = sparsify.convert(copy.deepcopy(dense))
    for one in (dense, sparse):
        one(SOURCE, src_key_padding_mask=PADDED).square().sum().backward()
    for ours, theirs in (
        ("in_proj.weight", "in_proj_weight"),
        ("out_proj.weight",) * 2,
        ("in_proj.bias", "in_proj_bias"),
    ):
        found = sparse.layers[0].self_attn.get_parameter(ours).grad
        torch.testing.assert_close(found, dense.layers[0].self_attn.get_parameter(theirs).grad, rtol=1e-9, atol=1e-9)


def test_save_load_copy_and_compile(tmp_path: Path) -> None:
    pruned = sparsify.prune(sparsify.convert(encoder(norm=True)), 0.5).eval()
    fast = sparsify.export(pruned, format="csr")
    with torch.no_grad():
        for model in (pruned, fast):
            expected = model(SOURCE, src_key_padding_mask=PADDED)
            sparsify.save(model, tmp_path / "model.safetensors")
            loaded = sparsify.load(tmp_path / "model.safetensors", encoder(norm=True, seed=1).eval())
            assert isinstance(loaded, UnfusedEncoder)
            assert torch.equal(loaded(SOURCE, src_key_padding_mask=PADDED), expected)
            assert torch.equal(copy.deepcopy(model)(SOURCE, src_key_padding_mask=PADDED), expected)
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            assert_same(compiled(SOURCE), model(SOURCE))
    dense = torch.compile(sparsify.to_dense(copy.deepcopy(pruned)), fullgraph=True, backend="eager")
    with torch.no_grad():  # where torch does not pack
        found, wanted = (one(SOURCE, src_key_padding_mask=PADDED) for one in (compiled, dense))
    assert_same(found, wanted)
    state = encoder(norm=True, seed=2).state_dict()
    assert pruned.load_state_dict(state, strict=True)
