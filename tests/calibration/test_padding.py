"""Padding is found by what depends on it: every layer sees just the tokens, whatever sizes happen to agree."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify import PaddingWarning, convert, prune
from sparsify.calibration.sequential import calibrate_groups


def mask_of(lengths: list[int], n: int) -> Tensor:
    return (torch.arange(n) < torch.tensor(lengths)[:, None]).long()


def ids(lengths: list[int], n: int, seed: int = 0, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids, 0 where padding is, and their attention mask."""
    mask = mask_of(lengths, n)
    mask = mask.flip(1) if left else mask
    return torch.randint(1, 20, mask.shape, generator=torch.Generator().manual_seed(seed)) * mask, mask


class Text(nn.Module):
    """Attention that keeps to the mask, token by token before and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q, self.v, self.out = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def attend(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """x: (batch, length, 8); mask: (batch, length of the memory)."""
        scores = (self.q(x) @ memory.mT).masked_fill(mask[:, None] == 0, torch.finfo().min)
        return x + self.out(scores.softmax(-1) @ self.v(memory))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.attend(x, x, attention_mask)


class TimeFirst(Text):
    """The same on (length, batch, 8)."""

    def attend(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        x = memory = x.transpose(0, 1).contiguous()
        scores = torch.einsum("ibd,jbd->bij", self.q(x), memory).masked_fill(mask[:, None] == 0, torch.finfo().min)
        return x + self.out(torch.einsum("bij,jbd->ibd", scores.softmax(-1), self.v(memory)))


class Flat(Text):
    """Its layers get rows, (batch x length, 8)."""

    def attend(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        return super().attend(x, memory, mask) + self.out(self.q(x.reshape(-1, 8))).view(x.shape)


class Careless(Text):
    """Padding reaches every token of its sequence."""

    def attend(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        return super().attend(x + x.mean(1, keepdim=True), memory, torch.ones_like(mask))


class Translator(nn.Module):
    """An encoder, and a decoder that attends to it; `k` gets the encoder's rows, all else of the decoder its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.k = Text(), Text(), nn.Linear(8, 8)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, decoder_attention_mask: Tensor
    ) -> Tensor:
        memory = self.encoder(input_ids, attention_mask)
        x = self.decoder(decoder_input_ids, decoder_attention_mask)
        return self.decoder.attend(x, self.k(memory), attention_mask)


def rows_seen(model: nn.Module, data: list[Any]) -> dict[str, int]:
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {name: group.gram.n_rows for group in calibrate_groups(model, layers, data) for name in group.names}


def same_grams(model: nn.Module, padded: list[Any], single: list[Any]) -> bool:
    """Return whether padded data and the same sequences one by one show every layer the same."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    one, two = (
        {name: group.gram for group in calibrate_groups(model, layers, data) for name in group.names}
        for data in (padded, single)
    )
    for name in layers:
        assert one[name].n_rows == two[name].n_rows
        torch.testing.assert_close(one[name].matrix, two[name].matrix, rtol=1e-4, atol=1e-5)
    return True


@pytest.mark.parametrize("make", [Text, TimeFirst, Flat])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("lengths", [[4, 2], [5, 3, 2, 5, 1], [5, 4, 3, 2, 1], [4, 4, 4, 3]])
def test_the_rows_are_those_of_the_sequences_one_by_one(
    make: Callable[[], nn.Module], left: bool, lengths: list[int]
) -> None:
    torch.manual_seed(0)
    tokens, mask = ids(lengths, max(lengths), left=left)
    whole, _ = ids([3, 3], 3, seed=1)
    padded = [
        {"input_ids": whole, "attention_mask": torch.ones_like(whole)},
        {"attention_mask": mask, "input_ids": tokens},
    ]
    single = [
        {"input_ids": row[keep][None], "attention_mask": torch.ones(1, int(keep.sum()))}
        for row, keep in zip([*whole, *tokens], [*torch.ones_like(whole).bool(), *mask.bool()], strict=True)
    ]
    assert same_grams(make().eval(), padded, single)


@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize("lengths", [[4, 3, 1], [3, 1, 2]])
def test_encoder_and_decoder_of_one_size_have_a_mask_each(lengths: list[int], as_tuple: bool) -> None:
    torch.manual_seed(0)
    model = Translator().eval()
    (source, mask), (target, target_mask) = ids(lengths, 4), ids([2, 2, 4], 4, seed=1)
    data: Any = (source, mask, target, target_mask)
    if not as_tuple:
        data = dict(
            zip(("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"), data, strict=True)
        )
    seen = rows_seen(model, [data])
    assert {name: n for name, n in seen.items() if not name.startswith("decoder")} == dict.fromkeys(
        ("encoder.q", "encoder.v", "encoder.out", "k"), sum(lengths)
    )
    assert (seen["decoder.q"], seen["decoder.out"]) == (16, 16)  # of the decoder's two calls
    assert seen["decoder.v"] == 8 + sum(lengths)  # once on its own rows, once on the encoder's


def test_a_mask_of_the_encoder_alone_is_not_the_decoders() -> None:
    model = Translator().eval()
    (source, mask), (target, _) = ids([4, 3, 1], 4), ids([4, 4, 4], 4, seed=1)
    seen = rows_seen(model, [(source, mask, target, torch.ones_like(target))])
    assert (seen["encoder.q"], seen["k"], seen["decoder.q"]) == (8, 8, 24)


def test_features_with_the_length_first() -> None:
    """As torch's attention takes them, with torch's own mask, in which True is padding; as many as they are long."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

        def forward(self, src: Tensor, src_key_padding_mask: Tensor) -> Tensor:
            return self.out(self.attention(src, src, src, key_padding_mask=src_key_padding_mask)[0])

    torch.manual_seed(0)
    mask = mask_of([4, 2, 1, 3], 4)
    assert rows_seen(convert(Encoder()).eval(), [(torch.randn(4, 4, 8), mask == 0)])["out"] == 10


def test_padding_that_reaches_every_token_is_still_found() -> None:
    tokens, mask = ids([4, 2, 1, 3], 4)
    seen = rows_seen(Careless().eval(), [{"input_ids": tokens, "attention_mask": mask}])
    assert set(seen.values()) == {10}


def test_rows_that_do_not_descend_from_the_text_all_count() -> None:
    class Pair(Text):
        def __init__(self) -> None:
            super().__init__()
            self.image = nn.Linear(6, 8)

        def forward(self, input_ids: Tensor, attention_mask: Tensor, pixels: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(input_ids, attention_mask).mean() + self.image(pixels).mean()

    tokens, mask = ids([4, 2, 1], 4)
    seen = rows_seen(Pair().eval(), [(tokens, mask, torch.randn(3, 4, 6))])
    assert (seen["q"], seen["image"]) == (7, 12)


class Router(Text):
    """Sends each token to one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = super().forward(input_ids, attention_mask).reshape(-1, 8)
        chosen = x[:, 0] > 0
        return self.experts[0](x[chosen]).sum() + self.experts[1](x[~chosen]).sum()


def test_padding_that_cannot_be_told_from_tokens_is_said() -> None:
    torch.manual_seed(0)
    tokens, mask = ids([4, 2, 1], 4)
    with pytest.warns(PaddingWarning, match=r"^experts\..: there is padding .* give batches without"):
        seen = rows_seen(Router().eval(), [{"input_ids": tokens, "attention_mask": mask}])
    assert seen["q"] == 7
    assert seen["experts.0"] + seen["experts.1"] == 12


def test_a_mask_whose_tokens_are_not_given_is_said() -> None:
    class Shifted(Translator):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_attention_mask: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(input_ids, attention_mask, input_ids.roll(1, 1), decoder_attention_mask)

    (tokens, mask), (_, other) = ids([3, 3], 4), ids([2, 4], 4)
    with pytest.warns(PaddingWarning, match=r"decoder\.q"):
        rows_seen(Shifted().eval(), [(tokens, mask, other)])


def test_a_mask_that_is_added_to_scores_is_no_mask_of_zeros_and_ones() -> None:
    tokens, mask = ids([4, 2], 4)
    with pytest.raises(ValueError, match=r"batch 0 .* 'attention_mask' must mark padding with 0 and tokens with 1"):
        rows_seen(Text(), [{"input_ids": tokens, "attention_mask": (1.0 - mask) * -1e9}])


def test_nothing_is_left_of_the_look(one_thread: None) -> None:
    """No hook, no changed token, no drawn number."""
    model = Text()
    tokens, mask = ids([4, 2], 4)
    before = tokens.clone()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    rows_seen(model, [{"input_ids": tokens, "attention_mask": mask}])
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(tokens, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps", "magnitude"])
def test_pruning_sees_no_padding(method: str) -> None:
    """The contents of the padding change no mask, with as many sequences as tokens."""
    tokens, mask = ids([4, 2, 1, 3], 4)
    masks = []
    for padding in (0, 7):
        torch.manual_seed(0)
        data = {"input_ids": tokens.masked_fill(mask == 0, padding), "attention_mask": mask}
        model = prune(convert(TimeFirst()), 0.5, method=method, data=[data])
        masks.append(torch.cat([model.q.mask, model.v.mask, model.out.mask]))
    assert torch.equal(*masks)


class Zeroed(Text):
    """Sets padding to zero, so that nothing depends on what stands there."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids) * attention_mask[..., None]
        return self.attend(x, x, attention_mask)


def test_padding_that_is_set_to_zero_is_found_by_taking_the_mask_away() -> None:
    tokens, mask = ids([4, 2, 3, 3], 4)
    assert set(rows_seen(Zeroed().eval(), [(tokens, mask)]).values()) == {12}
