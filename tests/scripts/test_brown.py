"""The Brown corpus as words, from its archive and from files by themselves."""

import io
import tarfile
from pathlib import Path

from pretrained import brown


def test_a_file_is_read_as_words_without_tags(tmp_path: Path) -> None:
    (tmp_path / "ca01").write_text("\n\n\tThe/at 1/2/cd jury/nn said/vbd ./.\n\n")
    assert brown.words("ca01", tmp_path) == ["The", "1/2", "jury", "said", "."]


def test_the_corpus_is_read_in_the_order_of_its_files(tmp_path: Path) -> None:
    contents = {"package/cb02": "two/cd", "package/ca10": "ten/cd", "package/README": "no/rb", "package/ca1": "no/rb"}
    with tarfile.open(tmp_path / "corpus.tgz", "w:gz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content.encode()))
    assert list(brown.corpus(tmp_path).items()) == [("ca10", ["ten"]), ("cb02", ["two"])]


def test_evaluations_read_files_of_each_kind() -> None:
    assert {file[1] for file in brown.EVALUATION_FILES} == set("abcdefghjklmnpr")
    assert len(set(brown.EVALUATION_FILES)) == 17
