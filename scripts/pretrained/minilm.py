"""MiniLM-L6 and the quality of its sentence embeddings, for the demo, oneshot.py and tests/scripts/test_minilm.py.

Quality is the correlation of embedding similarities with human ratings of the Lee news documents: 50 documents,
1225 pairs, each rated by about ten people (Lee, Pincombe and Welsh 2005). `scripts/assets.py` fetches model and data.
"""

import functools
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from assets import ASSETS
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import BertConfig, BertModel
from transformers.utils import logging

import sparsify
from pretrained import brown

MODEL_FOLDER = ASSETS / "minilm"
DENSE_FILE = MODEL_FOLDER / "model.safetensors"
LEE_FOLDER = ASSETS / "lee"

ENCODER_LAYERS = ["encoder.layer.*"]  # 36 of the model's 37 Linears; the other is BertModel's pooler, unused here
MAX_TOKENS = 256  # as published
N_BACKGROUND, CALIBRATION_BATCH = 300, 8


def load_dense(folder: Path = MODEL_FOLDER) -> nn.Module:
    """Load the pretrained model, float32, in eval mode."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # "Loading weights": it takes 50 ms
    model: nn.Module = BertModel.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def build_fresh(folder: Path = MODEL_FOLDER) -> nn.Module:
    """Build the same architecture with random weights, in eval mode, to load a saved file onto it."""
    model: nn.Module = BertModel(BertConfig.from_pretrained(folder))
    return model.eval()


def encoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the 36 Linears of ENCODER_LAYERS, by name, as far as they are Linears (a CSRLinear is none)."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("encoder.layer.")
    }


def load_tokenizer(max_tokens: int = MAX_TOKENS, folder: Path = MODEL_FOLDER) -> Tokenizer:
    """Load the tokenizer, cutting at `max_tokens` and padding to the longest text of a batch.

    The file itself asks for exactly 128 tokens: longer documents would be cut, and shorter ones padded.
    """
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(max_tokens)
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    return tokenizer


def embed(texts: Sequence[str], model: nn.Module, *, batch_size: int = 25, progress: str | None = None) -> Tensor:
    """Embed each text: the mean over its tokens, scaled to length 1.

    Returns (len(texts), hidden_size). `progress` names a progress bar; without it, or in a log file, there is none.
    """
    tokenizer = load_tokenizer()
    batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    pooled = []
    with torch.inference_mode():
        for batch in tqdm(batches, desc=progress, disable=None if progress else True, unit="batch"):
            encodings = tokenizer.encode_batch(list(batch))
            ids = torch.tensor([encoding.ids for encoding in encodings])
            mask = torch.tensor([encoding.attention_mask for encoding in encodings])
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
            pooled.append((hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True))
    return nn.functional.normalize(torch.cat(pooled), dim=1)


def calibration_batches(n_documents: int = N_BACKGROUND) -> list[dict[str, Tensor]]:
    """Return the background documents as token ids, in batches of documents of one length: none is padded."""
    documents = (LEE_FOLDER / "lee_background.cor").read_text(encoding="latin-1").splitlines()[:n_documents]
    tokenizer = load_tokenizer()
    tokenizer.no_padding()
    encoded = sorted((encoding.ids for encoding in tokenizer.encode_batch(documents)), key=len)
    batches = []
    for _, group in groupby(encoded, key=len):
        same = list(group)
        batches += [
            {"input_ids": torch.tensor(same[i : i + CALIBRATION_BATCH])} for i in range(0, len(same), CALIBRATION_BATCH)
        ]
    return batches


def mixed_batches(n_pieces: int, *, prose: bool = False) -> list[dict[str, Tensor]]:
    """Return pieces of 128 tokens, as many of each source: background documents, Wikipedia and, if told so, prose.

    prose: the Brown corpus without the files of the evaluations.
    """
    return sparsify.mix_data(_sources(prose), n_pieces)


def all_batches(*, prose: bool = False) -> list[dict[str, Tensor]]:
    """Return all pieces of these sources, to tune on."""
    return [batch for batches in _sources(prose).values() for batch in batches]


@functools.cache
def _sources(prose: bool) -> dict[str, list[dict[str, Tensor]]]:
    from pretrained import wikipedia

    background = (LEE_FOLDER / "lee_background.cor").read_text(encoding="latin-1").splitlines()
    sources = {"news": _pieces(background), "Wikipedia": _pieces(wikipedia.articles())}
    if prose:
        others = (words for name, words in brown.corpus().items() if name not in brown.EVALUATION_FILES)
        sources["prose"] = _pieces([" ".join(words) for words in others])
    return sources


def _pieces(texts: Sequence[str], n_tokens: int = 128, batch: int = 8) -> list[dict[str, Tensor]]:
    """Cut texts into pieces of one length, each with its own beginning and end; a shorter rest is left out."""
    tokenizer = load_tokenizer()
    tokenizer.no_padding()
    tokenizer.no_truncation()
    pieces: list[list[int]] = []
    for text in texts:
        begin, *ids, end = tokenizer.encode(text).ids
        n = n_tokens - 2
        pieces += [[begin, *ids[start : start + n], end] for start in range(0, len(ids) - n + 1, n)]
    return [{"input_ids": torch.tensor(pieces[i : i + batch])} for i in range(0, len(pieces), batch)]


def lee_documents(folder: Path = LEE_FOLDER) -> list[str]:
    """Read the 50 news documents."""
    return (folder / "lee.cor").read_text(encoding="latin-1").splitlines()


def lee_ratings(folder: Path = LEE_FOLDER) -> NDArray[np.float64]:
    """Read the mean human ratings: (50, 50), above the diagonal the similarity of each pair, 0 to 1."""
    return np.loadtxt(folder / "similarities0-1.txt")


def lee_correlation(embeddings: Tensor, ratings: NDArray[np.float64]) -> float:
    """Compute Pearson's r between the embeddings' cosines and the human ratings, over all pairs of documents.

    embeddings is (documents, hidden), of length 1; ratings is (documents, documents), only its upper triangle is read.
    """
    rows, columns = np.triu_indices(len(ratings), k=1)
    return _pearson(_cosines(embeddings)[rows, columns], ratings[rows, columns])


def lee_interval(
    embeddings: Tensor, ratings: NDArray[np.float64], *, n_samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Compute the 95% interval of `lee_correlation` over the choice of documents.

    A bootstrap over documents, not over pairs, since pairs with a document in common are not independent. A document
    drawn twice makes a pair with itself, similar by construction; such pairs are left out.
    """
    rows, columns = np.triu_indices(len(ratings), k=1)
    cosines = _cosines(embeddings)
    rated = np.triu(ratings, k=1) + np.triu(ratings, k=1).T
    generator = np.random.default_rng(seed)
    correlations = []
    for _ in range(n_samples):
        drawn = generator.integers(len(ratings), size=len(ratings))
        left, right = drawn[rows], drawn[columns]
        left, right = left[left != right], right[left != right]
        correlations.append(_pearson(cosines[left, right], rated[left, right]))
    low, high = np.quantile(correlations, [0.025, 0.975])
    return float(low), float(high)


def mean_cosine(embeddings: Tensor, reference: Tensor) -> float:
    """Average the cosine between each text's two embeddings; both (texts, hidden), of length 1."""
    return float((embeddings.double() * reference.double()).sum(1).mean())


def _cosines(embeddings: Tensor) -> NDArray[np.float64]:
    wide = embeddings.double()
    cosines: NDArray[np.float64] = (wide @ wide.T).numpy()
    return cosines


def _pearson(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    return float(np.corrcoef(x, y)[0, 1])
