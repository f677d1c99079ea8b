"""The package is what docs/architecture.md says: imports point one way, and every public name is listed."""

import ast
import importlib
from pathlib import Path

import pytest

import sparsify

PACKAGE = Path(sparsify.__file__).parent

#: The packages from the tensor-only ones to the command line, as docs/architecture.md lists them.
ORDER = tuple(
    (PACKAGE.parent / "docs" / "architecture.md")
    .read_text()
    .partition("```import-order\n")[2]
    .partition("```")[0]
    .split()
)


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def files_of_package() -> list[Path]:
    return [file for file in sorted(PACKAGE.rglob("*.py")) if file != PACKAGE / "__init__.py"]


def imports_of(file: Path) -> set[str]:
    """Return the parts of the package that a file imports anywhere, "" for the package itself."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "sparsify" else [module]
        else:
            continue
        ours = [name.split(".") for name in names if name.split(".")[0] == "sparsify"]
        found |= {name[1] if len(name) > 1 else "" for name in ours}
    return found


def test_every_file_has_its_place_in_the_order() -> None:
    assert {part_of(file) for file in files_of_package()} == set(ORDER)


@pytest.mark.parametrize("file", files_of_package(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_backwards(file: Path) -> None:
    part = part_of(file)
    if part in ("cli", "__main__"):  # users of the whole package
        return
    earlier = ORDER[: ORDER.index(part)]
    for imported in imports_of(file):
        assert imported == part or imported in earlier, f"{part} imports {imported or 'the package itself'}"
    if imports_of(file) & {part}:
        assert file.parent != PACKAGE, f"{part} imports itself"


def test_imports_are_seen() -> None:
    """The check above would pass if it saw no import."""
    assert imports_of(PACKAGE / "pruning" / "prune.py") >= {"conversion", "masking"}
    assert imports_of(PACKAGE / "cli" / "compress.py") >= {"", "recipes"}


def test_all_lists_every_public_name() -> None:
    imported = {
        alias.asname or alias.name
        for node in ast.parse((PACKAGE / "__init__.py").read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(sparsify.__all__) == {name for name in imported if not name.startswith("_")}
    assert sparsify.__all__ == sorted(sparsify.__all__)


@pytest.mark.parametrize("file", files_of_package(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_every_file_says_what_it_is_for(file: Path) -> None:
    assert ast.get_docstring(ast.parse(file.read_text()))


#: Files about one extra, which import it at the top and are themselves imported late.
LATE = {"transformers": ("layers/sparse_conv1d.py", "conversion/converters/conv1d.py"), "torchvision": ()}


@pytest.mark.parametrize("name", LATE)
def test_extras_are_imported_late(name: str) -> None:
    late = [PACKAGE / file for file in LATE[name]]
    assert all(name in file.read_text() for file in late)
    modules = [".".join(("sparsify", *file.relative_to(PACKAGE).with_suffix("").parts)) for file in late]
    for file in files_of_package():
        if part_of(file) == "integrations":  # imported by the name of what it needs
            continue
        if file not in late:
            top = [node for node in ast.parse(file.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
            for word in (name, *modules):
                assert not any(word in ast.unparse(node) for node in top), file


@pytest.mark.parametrize("part", [part for part in ORDER if part != "__main__"])
def test_every_part_can_be_imported(part: str) -> None:
    importlib.import_module(f"sparsify.{part}")
