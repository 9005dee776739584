"""`medseg completion`: the shell completes commands, options, models, structures and files.

The script that a shell reads calls `medseg complete` with the words typed so far. What comes back
is a line for each word that fits; the line `:files` or `:folders` says that files fit, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from medseg.cli.help import takes_value
from medseg.cli.options import check_one_of
from medseg.text import harmless

FILES, FOLDERS = ":files", ":folders"
_BASH = """\
_medseg_complete() {
    local IFS=$'\\n' tab=$'\\t' word=${COMP_WORDS[COMP_CWORD]} line
    COMPREPLY=()
    for line in $(PROGRAM complete -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null); do
        case $line in
            :files) COMPREPLY+=($(compgen -f -- "$word")); compopt -o filenames ;;
            :folders) COMPREPLY+=($(compgen -d -- "$word")); compopt -o filenames ;;
            *) COMPREPLY+=("${line%%$tab*}") ;;
        esac
    done
}
complete -F _medseg_complete medseg
"""
_ZSH = """\
#compdef medseg
_medseg() {
    local line tab=$'\t'
    local -a fitting
    for line in "${(@f)$(PROGRAM complete -- "${(@)words[2,CURRENT]}" 2>/dev/null)}"; do
        case $line in
            :files) _files ;;
            :folders) _files -/ ;;
            '') ;;
            *) fitting+=("${${line%%$tab*}//:/\\\\:}:${line#*$tab}") ;;
        esac
    done
    (( ${#fitting} )) && _describe medseg fitting
}
if [ "$funcstack[1]" = _medseg ]; then _medseg "$@"; else compdef _medseg medseg; fi
"""
_FISH = """\
function __medseg_complete
    set -l words (commandline -opc) (commandline -ct)
    for line in (PROGRAM complete -- $words[2..] 2>/dev/null)
        switch $line
            case :files
                __fish_complete_path (commandline -ct)
            case :folders
                __fish_complete_directories (commandline -ct)
            case '*'
                echo $line
        end
    end
end
complete --command medseg --no-files --arguments '(__medseg_complete)'
"""
SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def completion(
    shell: Annotated[str, typer.Argument(metavar="bash|zsh|fish", help="The shell.")],
) -> None:
    """Print a script for a shell: it completes commands, options, models, structures and files.

    Examples:
    medseg completion bash > ~/.local/share/bash-completion/completions/medseg
    medseg completion zsh > ~/.zfunc/_medseg
    medseg completion fish > ~/.config/fish/completions/medseg.fish
    """
    check_one_of("bash|zsh|fish", shell, tuple(SCRIPTS))
    print(SCRIPTS[shell].replace("PROGRAM", "medseg"), end="")


def complete(
    typed: Annotated[
        list[str] | None, typer.Argument(metavar="WORD...", help="The words typed so far.")
    ] = None,
) -> None:
    """Print what fits as the last of these words; for the shell."""
    for word, about in fitting(typed or [""]):
        print(harmless(word) + (f"\t{harmless(about)}" if about else ""))


def fitting(typed: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What fits as the last word typed, with what it means."""
    from typer.main import get_command

    from medseg.cli.app import make_app

    *before, word = typed
    name = next((one for one in before if not one.startswith("-")), "")
    program: Any = get_command(make_app(name))
    if name in program.commands:
        yield from _in_command(program.commands[name], before, word)
        return
    known = {one: each.help for one, each in program.commands.items() if not each.hidden}
    yield from _beginning(word, known | ({"--help": "", "--version": ""} if word else {}))


def _in_command(command: Any, before: Sequence[str], word: str) -> Iterator[tuple[str, str]]:
    """What fits as the word after others, the first of which is the command."""
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = {
        text: one
        for one in command.params
        if one not in arguments
        for text in (*one.opts, *one.secondary_opts)
    }
    name, equals, value = word.partition("=")
    if equals and name in options:
        for fit, about in _values(options[name], value, before):
            yield (fit if fit.startswith(":") else f"{name}={fit}"), about
    elif takes_value(options.get(before[-1])):
        yield from _values(options[before[-1]], word, before)
    elif word.startswith("-"):
        helps = {text: one.help for text, one in options.items()}
        yield from _beginning(word, helps | {"--help": "Show the help."})
    elif arguments:
        yield from _values(arguments[0], word, before)


def _values(one: Any, word: str, before: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What an option or argument may be given, by its metavar."""
    metavar = str(one.metavar or "")
    words = [part for part in metavar.split("|") if _WORD.fullmatch(part)] if "|" in metavar else []
    done, comma, last = word.rpartition(",") if metavar == "STRUCTURES" else ("", "", word)
    for fit, about in _beginning(last, dict.fromkeys(words, "") or _known(metavar, before)):
        yield done + comma + fit, about
    if metavar in ("MODEL", "FOLDER"):
        yield FOLDERS, ""
    elif not words and metavar not in _NO_FILES and re.search("[A-Z]{3}", metavar):
        yield FILES, ""


def _known(metavar: str, before: Sequence[str]) -> dict[str, str]:
    """What is known by name of what a metavar stands for."""
    if metavar in ("MODEL", "MODEL/LABELS"):
        return _models()
    if metavar == "STRUCTURES":
        return _structures(before)
    if metavar == "KIND":
        from medseg.cli.schema import descriptions

        return descriptions()
    return {}


#: A word that an option may be given, in a metavar such as auto|stored|RAS.
_WORD = re.compile("[a-z0-9_]+|R[A-Z]+|L[A-Z]+")
#: Values that are no files.
_NO_FILES = (
    "SIZE", "TIME", "SHARE", "SECONDS", "KINDS", "NAMES", "TITLE", "HOST", "COLUMN", "TEXT",
    "KEY=VALUE", "ENTITY=VALUE", "LABEL", "LIST", "KIND", "STRUCTURES", "STRUCTURE",
    "HOST:PORT:TITLE",
    "PERCENT", "VOXELS",
)  # fmt: skip


def _beginning(word: str, known: dict[str, str]) -> Iterator[tuple[str, str]]:
    from medseg.cli.help import first_sentence

    for name, about in known.items():
        if name.casefold().startswith(word.casefold()):
            yield name, first_sentence(about or "")


def _models() -> dict[str, str]:
    """The names that `medseg models` lists."""
    from medseg.inference import UNTRAINED
    from medseg.models import bundled_models

    return dict.fromkeys(bundled_models(), "") | {
        name: model.about for name, model in UNTRAINED.items()
    }


def _structures(before: Sequence[str]) -> dict[str, str]:
    """The structures of the model that was typed, or of the embedded one."""
    from medseg.errors import MedsegError
    from medseg.inference import label_table, load_model

    models = [b for a, b in pairwise(before) if a in ("-m", "--model")] or ["brain"]
    try:
        if not Path(models[-1]).exists() and models[-1] not in _models():
            return {}
        return {
            name.replace(" ", "_"): ""
            for name in label_table(load_model(models[-1])).names.values()
        }
    except MedsegError:
        return {}
