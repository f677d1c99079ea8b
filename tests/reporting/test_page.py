"""The page about a file: what it says, that it asks for nothing, and, where there is a browser, how it looks."""

import html.parser
import json
import os
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsify
from sparsify.cli import main
from sparsify.layers.records import FormChoice, set_form_choice
from sparsify.reporting.file_facts import density_grid, file_facts
from sparsify.reporting.page import RunFacts, page
from sparsify.reporting.png import png

#: A browser without a window, and the accessibility checker: `npm install axe-core` gives the file.
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AXE = os.environ.get("SPARSIFY_AXE", "")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (apt-get install chromium)")


def saved(folder: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8))
    sparsify.convert(model)
    sparsify.prune(model, 0.75)
    fast = sparsify.export(model, format="csr")
    set_form_choice(fast[1], FormChoice("csr", 16, {"dense": 80.0, "csr": 20.0}, "a machine"))
    sparsify.save(fast, folder / "a<b>.safetensors")
    return folder / "a<b>.safetensors"


class Reader(html.parser.HTMLParser):
    """Tags that are opened and closed, and every attribute that leads somewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "action", "srcset")]
        assert tag != "img" or dict(attrs)["alt"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    return reader


def test_it_says_what_is_in_the_file_and_asks_for_nothing(tmp_path: Path) -> None:
    file = saved(tmp_path)
    text = page(file_facts(file))
    reader = read(text)
    assert all(link.startswith("data:") for link in reader.links)
    assert not re.search(r"https?://|@import|url\(|<script", text)
    words = " ".join(reader.text.split())
    for said in (f"{file.stat().st_size:,} bytes", "75.0% of them removed", "96 x 64", "4.00x", "a machine"):
        assert said in words, said
    assert "a<b>.safetensors" in words  # its name is text, and no markup
    assert "sparsify.load(" in words
    facts = file_facts(file)
    assert sum(facts.bytes_by_part.values()) == file.stat().st_size
    assert facts.bytes_by_part["0"] == 50 * 64 * 4
    assert set(facts.masks) == {"1", "3"}


def test_the_run_is_on_it_too(tmp_path: Path) -> None:
    run = RunFacts(
        [("speed", "2.00x dense")], {"dense": {"q": 1.0}, "sparse": {"q": 0.5}}, "groups: [<all>]", ["load()"], 1000
    )
    words = " ".join(read(page(file_facts(saved(tmp_path)), run)).text.split())
    for said in ("2.00x dense", "Quality", "groups: [<all>]", "load()", "of dense (1,000 bytes)"):
        assert said in words


def test_the_cells_of_a_mask() -> None:
    torch.manual_seed(0)
    for shape in ((1, 1), (7, 5), (48, 48), (49, 100), (300, 64)):
        mask = torch.rand(shape) < 0.3
        csr = mask.float().to_sparse_csr()
        grid = density_grid(csr.crow_indices(), csr.col_indices(), shape)
        height, width = grid.shape
        assert (height, width) == (min(48, shape[0]), min(48, shape[1]))
        rows, columns = torch.arange(shape[0]) * height // shape[0], torch.arange(shape[1]) * width // shape[1]
        for i, j in {(0, 0), (height - 1, width - 1), (height // 2, width // 3)}:
            assert float(grid[i, j]) == pytest.approx(float(mask[rows == i][:, columns == j].float().mean()))


def test_a_picture_is_a_png() -> None:
    levels = torch.tensor([[0.0, 1.0, 0.5], [2.0, -1.0, 0.25]])
    data = png(levels)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (3, 2)
    pixels = zlib.decompress(data[data.index(b"IDAT") + 4 : data.index(b"IEND") - 8])
    assert list(pixels) == [0, 0, 255, 128, 0, 255, 0, 64]


def test_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path).rename("a.safetensors")
    assert main(["report", "a.safetensors", "--html", "a.html"]) == 0
    assert "Layers by size" in Path("a.html").read_text()
    assert main(["report", "a.safetensors", "--html", "a.safetensors"]) == 2
    assert "which it would replace" in capsys.readouterr().err
    Path("own_net.py").write_text("from torch import nn\ndef build():\n    return nn.Sequential(nn.Linear(8, 4))\n")
    options = ["compress", "--model", "own_net:build", "--sparsity", "0.5", "--shape", "8", "--format", "csr"]
    assert main([*options, "--out", "b.safetensors", "--report", "b.html"]) == 0
    words = " ".join(read(Path("b.html").read_text()).text.split())
    for said in ("sparsity: 0.5", "from own_net import build", "x dense"):
        assert said in words
    assert main([*options, "--out", "b.safetensors", "--report", "b.safetensors"]) == 2


@needs_browser
def test_a_browser_shows_it_and_axe_finds_no_fault(tmp_path: Path) -> None:
    """Chromium lays out the page; axe-core checks it, where SPARSIFY_AXE names its file."""
    text = page(file_facts(saved(tmp_path)))
    check = "document.title = JSON.stringify({bad: [], h: document.body.scrollHeight, w: document.body.scrollWidth})"
    if AXE:
        check = (
            Path(AXE).read_text()
            + "\naxe.run().then(r => {document.body.innerHTML = '<pre id=found>' + JSON.stringify(r.violations.map("
            "v => [v.id, v.nodes.map(n => n.html.slice(0, 80))])) + '</pre>'})"
        )
    (tmp_path / "page.html").write_text(text.replace("</body>", f"<script>{check}</script></body>"))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += ["--virtual-time-budget=8000", "--dump-dom", f"file://{tmp_path}/page.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    if AXE:
        found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
        assert found, done.stdout[-2000:]
        assert json.loads(html.unescape(found[1])) == []
    else:
        title = re.search(r"<title>(.*?)</title>", done.stdout)
        assert title
        assert json.loads(html.unescape(title[1]))["h"] > 500
