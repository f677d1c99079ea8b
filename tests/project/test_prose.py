"""The rules of prose and size hold: first lines, relative words, and the length of lines, functions and files."""

import ast
import subprocess
from pathlib import Path

import pytest
import structure

ROOT = Path(__file__).resolve().parents[2]
COLUMNS, FILE_LINES, FUNCTION_LINES = 120, 400, 60
RELATIVE_WORDS = 1.8  # of 100 words of docstrings


def tracked(*patterns: str) -> list[Path]:
    """List the files of the repository by git's patterns."""
    done = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the files are listed by git, and this is no clone: {done.stderr.strip()}")
    files = [ROOT / name for name in done.stdout.split()]
    assert files, patterns
    return [file for file in files if file.exists()]


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> int:
    """Count the lines of a function without its docstring, blank lines and comments."""
    numbers = set(range(function.lineno, (function.end_lineno or 0) + 1))
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        numbers -= set(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    return sum(not lines[number - 1].lstrip().startswith("#") for number in numbers if lines[number - 1].strip())


@pytest.mark.parametrize("folder", ["sparsify", "scripts", "tests"])
def test_no_first_line_is_a_riddle(folder: str) -> None:
    assert structure.riddles(ROOT / folder) == []


@pytest.mark.parametrize("folder", ["sparsify", "scripts"])
def test_relative_words_are_few(folder: str) -> None:
    assert 0 < structure.relative_words(ROOT / folder) <= RELATIVE_WORDS


def test_files_and_functions_of_python_are_short() -> None:
    too_long = []
    for file in tracked("*.py"):
        lines = file.read_text().splitlines()
        if len(lines) > FILE_LINES:
            too_long.append(f"{file.relative_to(ROOT)}: {len(lines)} lines")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                n_lines = code_lines(node, lines)
                if n_lines > FUNCTION_LINES:
                    too_long.append(f"{file.relative_to(ROOT)}: {node.name}, {n_lines} lines of code")
    assert too_long == []


def test_lines_of_cpp_are_short() -> None:
    wide = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in tracked("*.cpp", "*.h")
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if len(line) > COLUMNS
    ]
    assert wide == []


def test_the_measures_see_what_they_measure(tmp_path: Path) -> None:
    text = '"""What is that?"""\n\n\ndef f():\n    """Which one."""\n\n    # no code\n    return 1\n'
    (tmp_path / "module.py").write_text(text)
    assert structure.riddles(tmp_path) == ["module.py: What is that?", "module.py: Which one."]
    assert structure.relative_words(tmp_path) == pytest.approx(60)
    function = ast.parse(text).body[1]
    assert isinstance(function, ast.FunctionDef)
    assert code_lines(function, text.splitlines()) == 2
