"""The package as it is installed: recipes by name, names of wheels, the README on an index, the word on kernels."""

import configparser
import os
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import sparsify
from sparsify.hardware import installation
from sparsify.kernels.cpu import library
from sparsify.recipes import given

ROOT = Path(__file__).resolve().parents[2]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
WITHOUT = {**os.environ, "SPARSIFY_NATIVE_LIBRARY": "/nowhere/_native.so"}


def test_a_recipe_is_found_by_name_and_a_file_of_that_name_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sparsify.load_recipe("magnitude-50", sparsity=0.7).groups[0].sparsity == 0.7
    (tmp_path / "magnitude-50").write_text("groups: [{sparsity: 0.25}]")
    assert sparsify.load_recipe("magnitude-50").groups[0].sparsity == 0.25
    with pytest.raises(sparsify.RecipeError, match="no file and no recipe 'magnitde-50'; did you mean 'magnitude-50'"):
        sparsify.load_recipe("magnitde-50")
    for missing in ("magnitude.yaml", "folder/magnitude-50"):
        with pytest.raises(FileNotFoundError):
            sparsify.load_recipe(missing)


def test_all_recipes_are_given_in_a_clone_and_in_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {file.stem for file in (ROOT / "recipes").glob("*.yaml")}
    assert set(given.given_recipes()) == names
    shutil.copytree(ROOT / "recipes", tmp_path / SETUP["INSTALLED_RECIPES"].name)
    monkeypatch.setattr(given, "_PLACES", (tmp_path / "given", ROOT / "recipes"))
    assert {file.parent for file in given.given_recipes().values()} == {tmp_path / "given"}
    assert Path(sparsify.__file__).parent / SETUP["INSTALLED_RECIPES"] == Path(given.__file__).with_name("given")


@pytest.mark.parametrize("built", [True, False])
def test_a_wheel_without_kernels_has_another_name(tmp_path: Path, built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sparsify").mkdir()
    (tmp_path / "sparsify" / (SETUP["LIBRARY"] if built else SETUP["REASON"])).write_text("no compiler\n")
    distribution = SETUP["PlatformDistribution"]({"name": "sparsify-torch", "version": "1.0"})
    command = SETUP["BdistWheel"](distribution)
    command.ensure_finalized()
    monkeypatch.setattr(distribution, "get_command_obj", lambda name: SimpleNamespace(build_lib=str(tmp_path)))
    tag = command.get_tag()
    name = f"{command.wheel_dist_name}-{'-'.join(tag)}"
    if built:
        assert name.startswith("sparsify_torch-1.0-py3-none-")
        assert tag[2] != "any"
    else:
        assert name == "sparsify_torch-1.0-0nokernels-py3-none-any"


def test_the_readme_on_an_index_has_no_dead_link() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "](docs/" in readme
    bare = SETUP["description"](readme, "")
    assert "](docs/" not in bare
    assert "docs/guide.md: one real model" in bare
    hosted = SETUP["description"](readme, "https://example.org/us/sparsify/")
    assert "[docs/guide.md](https://example.org/us/sparsify/blob/main/docs/guide.md)" in hosted
    assert "](https://example.org/us/sparsify/raw/main/docs/results/" in hosted


def test_the_import_says_once_that_there_are_no_kernels_and_the_doctor_knows_the_way() -> None:
    code = "import sparsify, sparsify.cli; sparsify.cli.main(['doctor'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=WITHOUT, capture_output=True, text=True)
    assert done.stderr.count("sparsify has no native kernels") == 1, done.stderr
    assert f"cd {ROOT} && {sys.executable} setup.py build_native" in done.stdout
    with_kernels = subprocess.run([sys.executable, "-c", "import sparsify"], cwd=ROOT, capture_output=True, text=True)
    if (ROOT / "sparsify/_native.so").exists():
        assert with_kernels.stderr == ""


def test_the_way_to_kernels_names_the_source_of_the_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text, source in (
        ('{"url": "file:///home/me/sparsify"}', "file:///home/me/sparsify"),
        ('{"url": "file:///tmp/sparsify_torch-0.1.0-py3-none-any.whl"}', "--no-binary sparsify-torch sparsify-torch"),
        (None, "--no-binary sparsify-torch sparsify-torch"),
    ):
        monkeypatch.setattr(installation, "distribution", lambda _, t=text: SimpleNamespace(read_text=lambda _: t))
        command = installation.rebuild_command(tmp_path / "sparsify")
        assert command.endswith(f"-m pip install --force-reinstall --no-deps --no-cache-dir {source}")


def test_extras_and_classifiers() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert {"hf", "plot", "vision", "all"} <= set(setup["options.extras_require"])
    assert "Programming Language :: Python :: 3.14" in setup["metadata"]["classifiers"]
    assert setup["metadata"]["version"] == "attr: sparsify.__version__"
    tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_workflow_repairs_wheels_as_the_script_does() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/wheels.yml").read_text())
    script = (ROOT / "scripts/wheel").read_text()
    assert {"sdist", "wheels"} <= set(workflow["jobs"])
    text = (ROOT / ".github/workflows/wheels.yml").read_text()
    assert "repair --exclude libgomp.so.1" in text
    assert "repair --exclude libgomp.so.1" in script


def test_a_library_of_other_sources_is_not_used() -> None:
    other = Path(torch.__file__).parent / "lib" / "libc10.so"
    code = "from sparsify.kernels.cpu import library; print(library.available(), library.why_missing())"
    environment = {**os.environ, "SPARSIFY_NATIVE_LIBRARY": str(other), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False "), done.stdout
    assert "built from other sources; build it again: python setup.py build_native" in done.stdout


def test_the_number_of_the_interface_is_that_of_the_header() -> None:
    header = (Path(sparsify.__file__).parent / "csrc" / "sparsify.h").read_text()
    assert f"#define SPARSIFY_INTERFACE {library.INTERFACE}\n" in header
