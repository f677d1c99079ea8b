"""The versions that are installed: constraints.txt pins what setup.cfg asks for, and scripts/setup_venv uses it."""

import os
import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def requirements(text: str) -> dict[str, Requirement]:
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    found = [Requirement(line) for line in lines if line]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def promised() -> dict[str, Requirement]:
    """Return what setup.cfg asks for, in the extras that scripts/setup_venv installs too."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    return requirements("\n".join([setup["options"]["install_requires"], extras["dev"], extras["hf"]]))


PINNED = requirements((ROOT / "constraints.txt").read_text())


@pytest.mark.parametrize("name", promised())
def test_what_is_installed_has_a_version_within_the_promised_range(name):
    ranges = promised()[name].specifier
    versions = [clause.version for clause in PINNED[name].specifier if clause.operator in ("==", ">=")]
    assert versions
    assert all(version in ranges for version in versions), f"{name}: setup.cfg {ranges}, constraints.txt {versions}"


def test_every_version_but_that_of_torch_is_exact():
    ranges = {name for name, pin in PINNED.items() if [clause.operator for clause in pin.specifier] != ["=="]}
    assert ranges == {"torch", "torchvision"}


@pytest.fixture
def checkout(tmp_path):
    """A copy of what scripts/setup_venv reads, and environments in which pip only writes its arguments to a file."""
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "constraints.txt", "scripts/setup_venv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "sparsify").mkdir()
    for venv in (".venv", ".venv-latest"):
        python = tmp_path / venv / "bin/python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\necho "{venv} $*" >>{tmp_path}/calls\n')
        python.chmod(0o755)
    return tmp_path


def installs(checkout: Path, *arguments: str) -> list[str]:
    """Run scripts/setup_venv; return its calls of pip install."""
    (checkout / "calls").write_text("")
    environment = {"PATH": os.environ["PATH"]}
    subprocess.run([checkout / "scripts/setup_venv", *arguments], check=True, env=environment, capture_output=True)
    return [line for line in (checkout / "calls").read_text().splitlines() if " install " in line]


def test_the_environment_gets_the_pinned_versions_and_again_when_they_change(checkout):
    calls = installs(checkout, "test")
    assert calls
    assert all(call.startswith(".venv ") and "--constraint constraints.txt" in call for call in calls)
    assert "-e .[test]" in calls[-1]
    assert installs(checkout, "test") == []
    with (checkout / "constraints.txt").open("a") as file:
        file.write("six==1.17.0\n")
    assert installs(checkout, "test") == calls


def test_the_latest_versions_have_their_own_environment_and_no_constraint(checkout):
    calls = installs(checkout, "--latest", "test")
    assert calls
    assert all(call.startswith(".venv-latest ") and "--upgrade" in call for call in calls)
    assert not any("constraint" in call for call in calls)
    assert installs(checkout, "--latest", "test") == calls  # newer ones may be out
    assert installs(checkout, "test")
