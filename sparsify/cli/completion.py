"""sparsify completion: a script with which a shell completes commands, options and their values."""

from __future__ import annotations

import argparse
import shlex

SHELLS = ("bash", "zsh", "fish")

_BASH = """# sparsify completion bash: add  eval "$(sparsify completion bash)"  to ~/.bashrc
_sparsify() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=
    case "${{COMP_WORDS[1]}} $before" in
{values}
        *) case "${{COMP_WORDS[1]}}" in
{options}
           esac ;;
    esac
    [ "$COMP_CWORD" -gt 1 ] || words={commands}
    [[ $word == -* || $COMP_CWORD == 1 || -z $words || $words != -* ]] || words=
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    [ -n "$words" ] || COMPREPLY=($(compgen -f -- "$word"))
}}
complete -o filenames -F _sparsify sparsify
"""


def completion(arguments: argparse.Namespace) -> None:
    """Print the script of a shell."""
    print(script(arguments.shell, arguments.parser()), end="")


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """Return the completion script of a parser with commands for "bash", "zsh" or "fish"."""
    commands = _commands(parser)
    if shell == "fish":
        return _fish(commands)
    values, options = [], []
    for name, command in commands.items():
        flags = [flag for action in _optional(command) for flag in action.option_strings]
        options.append(f"            {name}) words={shlex.quote(' '.join(flags))} ;;")
        for action in _optional(command):
            if action.choices:
                case = " | ".join(f'"{name} {flag}"' for flag in action.option_strings)
                values.append(f"        {case}) words={shlex.quote(' '.join(map(str, action.choices)))} ;;")
    text = _BASH.format(values="\n".join(values), options="\n".join(options), commands=shlex.quote(" ".join(commands)))
    if shell == "zsh":
        return "autoload -U +X bashcompinit && bashcompinit\n" + text.replace("bash", "zsh", 2).replace(
            "bashrc", "zshrc"
        )
    return text


def _fish(commands: dict[str, argparse.ArgumentParser]) -> str:
    lines = ["# sparsify completion fish | source"]
    for name, command in commands.items():
        about = shlex.quote(command.description or "")
        lines.append(f"complete -c sparsify -n __fish_use_subcommand -f -a {name} -d {about}")
        for action in _optional(command):
            flags = " ".join(
                f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in action.option_strings
            )
            value = "" if action.nargs == 0 else " -r"
            choices = f" -f -a {shlex.quote(' '.join(map(str, action.choices)))}" if action.choices else ""
            about = shlex.quote((action.help or "").replace("\n", " "))
            lines.append(
                f"complete -c sparsify -n '__fish_seen_subcommand_from {name}' {flags}{value}{choices} -d {about}"
            )
    return "\n".join(lines) + "\n"


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(found.choices)


def _optional(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.option_strings and action.help != argparse.SUPPRESS]
