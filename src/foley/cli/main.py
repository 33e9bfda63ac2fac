"""The `foley` command: a verb for everything a user does; each is one of the scripts, run in this process.

It imports nothing that takes time: help and completion are read from the scripts' and the configs' text.
"""

import ast
import re
import runpy
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import foley
from foley.cli.completion import SHELLS, candidates, shell_code
from foley.cli.help import asks_for_help, chosen_config, help_page
from foley.core.config import SHIPPED_ROOT


@dataclass(frozen=True)
class Verb:
    """A script, as seen from the root of the checkout.

    Args:
        overrides: what the verb gives the script, unless the user names the same option.
        summary: its line in the list of verbs; by default the first line of the script's docstring.
        words: options that may be given without their names, in this order.
    """

    script: str
    overrides: tuple[str, ...] = ()
    summary: str | None = None
    words: tuple[str, ...] = ()

    def named(self, arguments: Sequence[str]) -> list[str]:
        """The arguments with the names of those that came without; raises SystemExit for more words than options.

        >>> Verb("scripts/detect.py", words=("file",)).named(["a dog.wav", "output=FOUND"])
        ['file=a dog.wav', 'output=FOUND']
        """
        plain = [word for word in arguments if "=" not in word and not word.startswith(("-", "+", "~"))]
        if self.words and len(plain) > len(self.words):
            raise SystemExit(f"{' '.join(plain)}: give {' '.join(name.upper() for name in self.words)}")
        names = dict(zip(plain, self.words, strict=False))
        return [f"{names[word]}={word}" if word in names else word for word in arguments]


VERBS: dict[str, dict[str, Verb]] = {
    "Sound": {
        "sample": Verb("sample.py"),
        "demo": Verb("scripts/demo.py"),
        "serve": Verb("scripts/serve.py"),
        "detect": Verb("scripts/detect.py", words=("file",)),
    },
    "Data": {
        "prepare": Verb("scripts/prepare.py"),
        "caption": Verb("scripts/caption.py"),
        "filter": Verb("scripts/filter_clap.py"),
        "audit": Verb("scripts/audit.py", words=("folder",)),
        "shards": Verb("scripts/make_shards.py"),
        "render": Verb("scripts/render_procedural.py"),
        "pack": Verb("scripts/pack_training_data.py"),
        "attribute": Verb("scripts/write_attributions.py"),
    },
    "Training": {
        "train": Verb("train.py"),
        "distil": Verb("train.py", ("experiment=audiolcm",), "Distil a denoiser into a student of few steps."),
        "prefer": Verb("scripts/make_preferences.py"),
        "encode": Verb("scripts/encode_latents.py"),
        "convert-latents": Verb("scripts/convert_latents.py"),
        "encode-text": Verb("scripts/encode_text.py"),
        "tokenizer": Verb("scripts/train_tokenizer.py"),
        "word-vectors": Verb("scripts/make_word_vectors.py"),
        "extractor": Verb("scripts/train_extractor.py"),
        "join-mel-codec": Verb("scripts/join_mel_codec.py"),
        "stages": Verb("scripts/run_stages.py"),
    },
    "Systems": {
        "calibrate": Verb("scripts/calibrate.py"),
        "export": Verb("scripts/export_system.py"),
        "convert": Verb("scripts/convert_checkpoint.py"),
        "card": Verb("scripts/write_card.py"),
        "push": Verb("scripts/push_system.py", words=("system", "repository")),
        "pull": Verb("scripts/pull_system.py", words=("repository", "output_dir")),
    },
    "Measuring": {
        "evaluate": Verb("evaluate.py"),
        "sweep": Verb("scripts/sweep_sampling.py"),
        "reconstruct": Verb("scripts/reconstruct.py"),
        "score-codec": Verb("scripts/score_codec.py"),
        "score-recordings": Verb("scripts/score_recordings.py"),
        "judge": Verb("scripts/judge.py"),
        "score-text-use": Verb("scripts/score_text_use.py"),
        "parameters": Verb("scripts/compare_parameters.py"),
        "listening-test": Verb("scripts/listening_test.py"),
        "analyse-listening-test": Verb("scripts/analyse_listening_test.py"),
        "gpu-check": Verb("scripts/gpu_check.py"),
        "report": Verb("scripts/report.py"),
        "dashboard": Verb("scripts/wandb_report.py"),
    },
}
"""The verbs, under the headings of `foley --help`. `bench NAME` comes on top: a file of scripts/bench each."""


def main(arguments: Sequence[str] | None = None) -> None:
    """`foley VERB [key=value ...]`; raises SystemExit for a verb that there is not."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--complete"]:
        sys.stdout.write("\n".join(complete(words[1:])) + "\n")
    elif words[:1] == ["--completion"]:
        sys.stdout.write(shell_code(words[1] if len(words) > 1 else ""))
    elif words[:1] == ["--version"]:
        sys.stdout.write(f"foley {foley.__version__}\n")
    elif not words or words[0] in ("--help", "-h", "help"):
        sys.stdout.write(overview())
    else:
        run_verb(words)


def run_verb(words: Sequence[str]) -> None:
    """Run the script of a verb as `python SCRIPT` would, or show its help page."""
    name, arguments = split_verb(words)
    if name == "bench":
        _list_benchmarks()
        return
    verb = all_verbs().get(name)
    if verb is None:
        raise SystemExit(f"foley {name}: there is no such verb; the verbs are {', '.join([*all_verbs(), 'bench'])}")
    if asks_for_help(arguments):
        sys.stdout.write(page_of(verb, arguments))
        return
    arguments = verb.named(arguments)
    given = {argument.partition("=")[0] for argument in arguments}
    own = [override for override in verb.overrides if override.partition("=")[0] not in given]
    # As the script's own: Lightning starts the processes of other devices by these words.
    sys.argv = [str(SHIPPED_ROOT / verb.script), *own, *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def page_of(verb: Verb, arguments: Sequence[str]) -> str:
    """A verb's help page, which calls every script by its verb."""
    programs = {other.script: f"foley {name}" for name, other in all_verbs().items() if not other.overrides}
    config_name = chosen_config(arguments, config_of(SHIPPED_ROOT / verb.script))
    page = help_page(config_name, verb.script, programs)
    if not verb.overrides:
        return page
    return f"{verb.summary} The same as {programs[verb.script]} {' '.join(verb.overrides)}:\n\n{page}"


def split_verb(words: Sequence[str]) -> tuple[str, list[str]]:
    """The verb and its arguments; `bench NAME` is one verb.

    >>> split_verb(["bench", "caching", "steps=25"])
    ('bench caching', ['steps=25'])
    """
    two = words[0] == "bench" and len(words) > 1 and not words[1].startswith("-")
    return " ".join(words[: 1 + two]), list(words[1 + two :])


def all_verbs() -> dict[str, Verb]:
    """Every verb by its name, `bench NAME` among them."""
    named = {name: verb for verbs in VERBS.values() for name, verb in verbs.items()}
    files = sorted((SHIPPED_ROOT / "scripts/bench").glob("*.py"))
    return named | {f"bench {file.stem}": Verb(f"scripts/bench/{file.name}") for file in files}


def overview() -> str:
    """The page of `foley --help`: a line for each verb."""
    project = "Train, distil, accelerate, evaluate and serve latent diffusion models for sound"
    sections = [f"{project}: foley VERB [key=value ...]"]
    for heading, verbs in VERBS.items():
        sections.append("\n".join([f"{heading}:", *(_line(name, verb) for name, verb in verbs.items())]))
    sections.append("foley bench lists the benchmarks. foley VERB --help lists the options of a verb.")
    sections.append('Completion of verbs and options in a shell: eval "$(foley --completion bash)", or zsh.')
    return "\n\n".join(sections) + "\n"


def _list_benchmarks() -> None:
    benchmarks = {name: verb for name, verb in all_verbs().items() if name.startswith("bench ")}
    lines = [_line(name.removeprefix("bench "), verb) for name, verb in benchmarks.items()]
    sys.stdout.write("\n".join(["Benchmarks: foley bench NAME [key=value ...]", "", *lines]) + "\n")


def _line(name: str, verb: Verb) -> str:
    words = verb.summary or summary_of(SHIPPED_ROOT / verb.script)
    return textwrap.fill(words, 120, initial_indent=f"  {name.ljust(23)} ", subsequent_indent=" " * 26)


def summary_of(script: Path) -> str:
    """The first sentence of a script's docstring, without what it adds after a colon or a semicolon.

    >>> summary_of(SHIPPED_ROOT / "scripts/make_shards.py")[:32]
    'Write the clips of a manifest to'
    """
    docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return re.split(r"[.:;](?:\s|$)", docstring, maxsplit=1)[0].replace("\n", " ") + "."


def config_of(script: Path) -> str:
    """The primary config that a script names in `@command(...)`.

    >>> config_of(SHIPPED_ROOT / "scripts/prepare.py")
    'script/prepare'
    """
    tree = ast.parse(script.read_text(encoding="utf-8"))
    decorators = [use for node in tree.body if isinstance(node, ast.FunctionDef) for use in node.decorator_list]
    calls = [use for use in decorators if isinstance(use, ast.Call) and getattr(use.func, "id", "") == "command"]
    return str(ast.literal_eval(calls[0].args[0]))


def complete(words: Sequence[str]) -> list[str]:
    """What may stand in the place of the last word of `foley WORDS`."""
    *before, word = words or [""]
    if not before:
        return [name for name in [*all_verbs(), "bench"] if " " not in name and name.startswith(word)]
    if before == ["bench"]:
        names = [name.removeprefix("bench ") for name in all_verbs() if name.startswith("bench ")]
        return [name for name in names if name.startswith(word)]
    name, arguments = split_verb(before)
    verb = all_verbs().get(name)
    return [] if verb is None else candidates(chosen_config(arguments, config_of(SHIPPED_ROOT / verb.script)), word)


__all__ = ["SHELLS", "VERBS", "Verb", "main"]
