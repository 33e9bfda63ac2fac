"""Completion in a shell: the code that the shell needs, and what may stand in the place of a word."""

from foley.cli.help import read_page

SHELLS = ("bash", "zsh")

# The shell breaks words at "=", so that it completes what follows: only that part of a candidate is handed back.
_BASH = """\
_foley_complete() {
    local line="${COMP_LINE:0:COMP_POINT}" word candidate
    local -a words
    read -ra words <<< "$line"
    [[ "$line" == *" " ]] && words+=("")
    word="${words[-1]}"
    COMPREPLY=()
    while IFS= read -r candidate; do
        [[ -n "$candidate" ]] && COMPREPLY+=("${candidate#"${word%"${word##*=}"}"}")
    done < <("${words[0]}" --complete "${words[@]:1}" 2>/dev/null)
    [[ "${COMPREPLY[0]-}" == *= ]] && compopt -o nospace
}
complete -o default -F _foley_complete foley
"""

# zsh keeps "key=value" as one word.
_ZSH = """\
_foley_complete() {
    local -a candidates
    candidates=("${(@f)$(foley --complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    compadd -S '' -- $candidates
}
autoload -Uz compinit && compinit
compdef _foley_complete foley
"""


def shell_code(shell: str) -> str:
    """What `eval "$(foley --completion SHELL)"` runs; raises SystemExit for another shell than bash and zsh."""
    if shell not in SHELLS:
        raise SystemExit(f"foley --completion {shell}: name one of {', '.join(SHELLS)}")
    return _BASH if shell == "bash" else _ZSH


def candidates(config_name: str, word: str) -> list[str]:
    """Options and groups of a primary config as `name=`, or the choices of a group once it is named.

    >>> candidates("script/export_system", "out")
    ['output_dir=']
    """
    page = read_page(config_name)
    name, equals, _ = word.partition("=")
    if equals:
        choices = next((group.choices for group in page.groups if group.name == name), ())
        found = [f"{name}={choice}" for choice in choices]
    else:
        names = dict.fromkeys(option.name for option in [*page.groups, *page.options])
        found = [*(f"{name}=" for name in names), "--help", "--cfg", "--multirun"]
    return [candidate for candidate in found if candidate.startswith(word)]
