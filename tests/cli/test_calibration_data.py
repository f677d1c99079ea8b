"""Calibration data from the command line: texts, pictures, functions, and what is none of them."""

import json
from pathlib import Path

import pytest
import torch

import sparsify
from sparsify.cli import main
from sparsify.cli.calibration_data import load_data


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A model folder with a tokenizer of a few words, and texts beside it."""
    pytest.importorskip("tokenizers", reason="tokenizers is missing: pip install 'sparsify-torch[hf]'")
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"w{i}": i for i in range(20)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (tmp_path / "model").mkdir()
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "b.txt").write_text(" ".join(f"w{i % 20}" for i in range(50, 103)))
    (tmp_path / "texts" / "a.txt").write_text(" ".join(f"w{i % 20}" for i in range(50)))
    return tmp_path


def test_texts_are_cut_into_pieces_of_one_length(words: Path) -> None:
    with pytest.warns(UserWarning, match=r"--data .*texts: 10 samples, and 100 were asked for \(--samples\)"):
        batches = list(load_data(str(words / "texts"), f"hf:{words / 'model'}", samples=100, tokens=10))
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert ids.flatten().tolist() == [i % 20 for i in range(100)]  # the last three words fill no piece
    assert [len(batch["input_ids"]) for batch in batches] == [8, 2]
    few = list(load_data(str(words / "texts"), f"hf:{words / 'model'}", samples=2, tokens=10))
    assert few[0]["input_ids"][:, 0].tolist() == [0, 50 % 20]


@pytest.mark.parametrize(
    ("source", "model", "options", "message"),
    [
        ("texts", "hf:{}/model", {"tokens": 200}, "the texts have 103 tokens, less than one sample of 200"),
        ("texts", "hf:{}/model", {"samples": 0}, "--samples and --sample-tokens must be positive"),
        ("texts", "my.models:small", {}, "texts need an hf:FOLDER model with a tokenizer \\("),
        ("model", "hf:{}/model", {}, "no text or picture"),
        ("nothing", "hf:{}/model", {}, "there is no such file or folder, nor such a function"),
        ("json:nothing", "hf:{}/model", {}, "there is no such file or folder, nor such a function"),
    ],
)
def test_what_is_no_data(words: Path, source: str, model: str, options: dict[str, int], message: str) -> None:
    path = source if ":" in source else str(words / source)
    with pytest.raises(ValueError, match=message):
        load_data(path, model.format(words), **options)


def test_pictures(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="pillow is missing: pip install pillow")
    for number, size in enumerate([(300, 400), (224, 100), (500, 256)]):
        image.new("RGB", size, (255, 0, 128)).save(tmp_path / f"{number}.png")
    (batch,) = load_data(str(tmp_path), "torchvision:resnet18", samples=3)
    assert batch.shape == (3, 3, 224, 224)
    expected = (torch.tensor([1.0, 0.0, 128 / 255]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    torch.testing.assert_close(batch[0, :, 100, 100], expected)
    (tmp_path / "note.txt").write_text("a text")
    with pytest.raises(ValueError, match="both texts and pictures"):
        load_data(str(tmp_path), "torchvision:resnet18")


def test_pictures_come_through_the_models_own_processor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("PIL.Image", reason="pillow is missing: pip install pillow")
    (tmp_path / "pictures").mkdir()
    for number in range(2):
        image.new("RGB", (300, 400), (255, 0, 0)).save(tmp_path / "pictures" / f"{number}.png")

    def read(model: str, **options: str) -> object:
        (batch,) = load_data(str(tmp_path / "pictures"), model, samples=2, **options)
        return batch

    def about() -> str:
        return capsys.readouterr().err

    batch = read("torchvision:vit_b_16", weights="IMAGENET1K_SWAG_E2E_V1")
    assert batch.shape == (2, 3, 384, 384)
    assert "pictures through the transforms of torchvision's ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1" in about()
    assert read("torchvision:vit_b_16").shape == (2, 3, 224, 224)
    assert "ViT_B_16_Weights.IMAGENET1K_V1" in about()
    batch = read("timm:vit_tiny_patch16_384")
    assert batch.shape == (2, 3, 384, 384)
    assert batch[1, :, 0, 0].tolist() == [1.0, -1.0, -1.0]  # a mean of 0.5, and not ImageNet's
    assert "timm's configuration of vit_tiny_patch16_384" in about()
    batch = read("my.models:build")
    torch.testing.assert_close(batch[0, 0, 0, 0], torch.tensor((1 - 0.485) / 0.229))
    assert "pictures as ImageNet's, since no processor is known for my.models:build: scaled to 256," in about()
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=16
    )
    folder = tmp_path / "vit"
    transformers.ViTModel(config).save_pretrained(folder)
    assert read(f"hf:{folder}").shape == (2, 3, 224, 224)
    assert "no processor is known" in about()
    numbers = {"size": {"height": 32, "width": 32}, "image_mean": [0.25] * 3, "image_std": [0.5] * 3}
    transformers.ViTImageProcessor(**numbers).save_pretrained(folder)
    batch = read(f"hf:{folder}")
    assert list(batch) == ["pixel_values"]
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert batch["pixel_values"][1, :, 0, 0].tolist() == [1.5, -0.5, -0.5]
    assert f"ViTImageProcessor of hf:{folder}" in about().replace("Fast", "").replace("Pil", "")
    out = ["--out", str(tmp_path / "out.safetensors")]
    data = ["--data", str(tmp_path / "pictures"), "--samples", "2", "--method", "wanda", "--types", "Linear"]
    assert main(["compress", "--model", f"hf:{folder}", *data, "--sparsity", "0.5", "--format", "csr", *out]) == 0


def test_texts_come_through_the_models_own_tokenizer(words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    plain = list(load_data(str(words / "texts"), f"hf:{words / 'model'}", samples=2, tokens=10))
    assert "token ids by tokenizer.json of hf:" in capsys.readouterr().err
    file = str(words / "model" / "tokenizer.json")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=file, unk_token="w0", model_max_length=4)
    tokenizer.save_pretrained(words / "own")
    own = list(load_data(str(words / "texts"), f"hf:{words / 'own'}", samples=2, tokens=10))
    assert torch.equal(own[0]["input_ids"], plain[0]["input_ids"])
    assert f"token ids by {type(tokenizer).__name__} of hf:" in capsys.readouterr().err


def test_pictures_that_are_none(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="pillow is missing: pip install pillow")
    file = tmp_path / "a.png"

    def read() -> None:
        list(load_data(str(tmp_path), "torchvision:resnet18", samples=1))

    for size in ((1, 48000), (70000, 1), (6000, 6000)):  # 256 x 12 million pixels when scaled; 36 million as they are
        image.new("1", size).save(file)
        with pytest.raises(ValueError, match=rf"a\.png: {size[0]}x{size[1]} pixels in [0-9,]+ bytes; .*leave it out"):
            read()
    file.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(OSError, match="cannot identify image file"):  # and no PostScript runs
        read()
    image.effect_noise((300, 300), 9).save(file)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(OSError, match=r"--data .*a\.png: image file is truncated"):
        read()


def test_compress_on_the_data_of_a_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "calibration_net.py").write_text(
        "import torch\n"
        "def build():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Linear(16, 12), torch.nn.ReLU(), torch.nn.Linear(12, 4))\n"
        "def batches():\n    torch.manual_seed(1)\n    return [torch.randn(32, 16) for _ in range(3)]\n"
    )
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out.safetensors"
    command = ["compress", "--model", "calibration_net:build", "--method", "sparsegpt", "--refit", "--sparsity", "0.5"]
    assert main([*command, "--data", "calibration_net:batches", "--out", str(out), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["in_memory"]
    assert [row["sparsity"] for row in rows] == [0.5, 0.5, 120 / 256]  # the last is the model, biases too
    assert all(0 < row["error"] < 1 for row in rows[:-1])
    assert sparsify.inspect(out)[0].sparsity == 0.5
    assert main([*command, "--out", str(out)]) == 2
    assert "method 'sparsegpt' needs calibration data" in capsys.readouterr().err
    assert main([*command, "--samples", "3", "--out", str(out)]) == 2
    assert "--samples and --sample-tokens have no effect without --data" in capsys.readouterr().err


def test_a_language_model_writes_its_own_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "writing_net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.embed, self.head = torch.nn.Embedding(24, 16), torch.nn.Linear(16, 24)\n"
        "    def forward(self, input_ids):\n        return self.head(self.embed(input_ids))\n"
        "def build():\n    torch.manual_seed(0)\n    return Net()\n"
        "def no_writer():\n    return torch.nn.Linear(4, 4)\n"
        "def batches():\n    return [torch.zeros(1, 2, dtype=torch.long)]\n"
    )
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out.safetensors"
    command = ["compress", "--method", "sparsegpt", "--sparsity", "0.5", "--out", str(out), "--data", "generated"]
    sizes = ["--samples", "4", "--sample-tokens", "9"]
    assert main([*command, *sizes, "--model", "writing_net:build", "--json"]) == 0
    printed = capsys.readouterr()
    assert "--data generated: 4 texts of 9 tokens, written by writing_net:build itself" in printed.err
    assert json.loads(printed.out)["in_memory"][0]["sparsity"] == 0.5
    refused = {
        "--data generated: the model does not run on input_ids alone": ["--model", "writing_net:no_writer"],
        "--data generated is for where no text is at hand": ["writing_net:batches", "--model", "writing_net:build"],
        "--data generated needs the model in memory": ["--model", "writing_net:build", "--stream"],
    }
    for message, words in refused.items():
        assert main([*command, *words]) == 2
        assert message in capsys.readouterr().err
