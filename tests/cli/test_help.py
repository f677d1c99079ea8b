"""Help, completion, and quiet ends: what a person meets before the first result."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sparsify
from sparsify.cli import main
from sparsify.cli.completion import SHELLS, script
from sparsify.cli.parser import EXAMPLES, make_parser


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_has_examples_that_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(command, capsys)
    for example in EXAMPLES[command]:
        assert f"  sparsify {command} {example}".rstrip() in text
        assert make_parser().parse_args([command, *shlex.split(example)]).run


def test_help_of_compress_is_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of("compress", capsys)
    groups = ["the model:", "the pruning:", "the layers:", "calibration data, and large models:", "the result:"]
    places = [text.index(f"\n{group}\n") for group in groups]
    assert places == sorted(places)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"sparsify {sparsify.__version__}\n"


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sparsify", "comp"], {"compress", "completion"}),
        (["sparsify", "compress", "--spars"], {"--sparsity"}),
        (["sparsify", "compress", "--format", "pan"], {"panel"}),
        (["sparsify", "bench", "--th"], {"--threads"}),
        (["sparsify", "inspect", "a.saf"], {"a.safetensors"}),
    ],
)
def test_bash_completes(words: list[str], expected: set[str], tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    given = (
        f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _sparsify; printf '%s\n' \"${{COMPREPLY[@]}}\""
    )
    code = f"{script('bash', make_parser())}\n{given}"
    done = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected
    assert done.stderr == ""


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in EXAMPLES)
    assert "sparsity" in text


def test_a_closed_pipe_ends_quietly() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(sparsify.__file__).parents[1])}
    for arguments in ("compress --help", "schema"):
        code = f"{shlex.quote(sys.executable)} -m sparsify {arguments} | head -c 5"
        done = subprocess.run(["bash", "-c", code], env=environment, capture_output=True, text=True)
        assert len(done.stdout) == 5
        assert done.stderr == ""


def test_an_interruption_ends_in_a_word(tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text(
        "import time\ndef build():\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(sparsify.__file__).parents[1])}
    command = [sys.executable, "-m", "sparsify", "inspect", "--model", "waits:build"]
    pipe = subprocess.PIPE

    def heed_interruptions() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a suite that runs in the background passes on that it does not

    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed_interruptions
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (130, "sparsify: interrupted\n")
