"""Recipes: bundled YAML files of training arguments, each of which loads as it is.

`2_4`, `1_4`, ... hold the method for one pattern, `mrpc`, `cola`, ... for one task, and `baselines/*` the methods to
compare with.
"""

import difflib
import re
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Iterable
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any

import yaml


_SUFFIX = ".yaml"


class _Loader(yaml.SafeLoader):
    # PyYAML follows YAML 1.1, which reads 2:4 as 124 (base 60), 1e-4 as a string and no as False. A recipe is likely
    # to hold each of these, so scalars follow the core schema of YAML 1.2 here.
    yaml_implicit_resolvers = {}


for _tag, _regexp, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_regexp})$"), _first)


def available_configs() -> list[str]:
    """
    The names of the bundled recipes.

    Returns:
        `list[str]`: Names that [`load_config`] takes, such as `"2_4"` and `"baselines/asp"`.
    """
    folder = resources.files(__name__)
    bundled = [*_yaml_names(folder), *(f"baselines/{name}" for name in _yaml_names(folder / "baselines"))]
    return sorted(bundled)


def _yaml_names(folder) -> list[str]:
    return [file.name.removesuffix(_SUFFIX) for file in folder.iterdir() if file.name.endswith(_SUFFIX)]


def load_config(name_or_path: str | PathLike) -> dict:
    """
    Loads a recipe.

    Args:
        name_or_path (`str` or `os.PathLike`):
            The path of a YAML file, or the name of a bundled recipe, with or without `.yaml`, see
            [`available_configs`]. A file that exists is preferred to a bundled recipe of that name.

    Returns:
        `dict`: The arguments by name.

    Raises:
        `ValueError`: If there is no such file or recipe, or it doesn't hold a mapping of names to values.
    """
    name = str(name_or_path).removesuffix(_SUFFIX)
    if Path(name_or_path).is_file():
        text = Path(name_or_path).read_text(encoding="utf-8")
    elif name in available_configs():
        text = resources.files(__name__).joinpath(*f"{name}{_SUFFIX}".split("/")).read_text(encoding="utf-8")
    else:
        raise ValueError(
            f"There is no config {str(name_or_path)!r}. Give the path of a YAML file that exists, or one of the names "
            f"that are bundled: {', '.join(available_configs())}."
        )
    try:
        config = yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader: builds plain values only
    except yaml.YAMLError as error:
        raise ValueError(f"Config {str(name_or_path)!r} is not valid YAML: {error}") from error
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise ValueError(
            f"Config {str(name_or_path)!r} must map argument names to values, one 'name: value' a line, but it holds "
            f"{config!r:.80}."
        )
    return config


def apply_config(parser: ArgumentParser, name_or_path: str | PathLike) -> None:
    """
    Makes a recipe's values the defaults of a parser, so that flags on the command line win.

    ```python
    parser = HfArgumentParser((ScriptArguments, ADMMTrainingArguments))
    apply_config(parser, "2_4")
    script, args = parser.parse_args_into_dataclasses()
    ```

    Args:
        parser (`argparse.ArgumentParser`):
            The parser, an [`~transformers.HfArgumentParser`] for example.
        name_or_path (`str` or `os.PathLike`):
            The recipe, see [`load_config`].

    Raises:
        `ValueError`: If there is no such recipe, or it has keys that are no flags of the parser. `config` is none: a
            recipe names no other.
    """
    values = load_config(name_or_path)
    known = {action.dest for action in parser._actions} - {"help", "help_all", "config", SUPPRESS}
    if unknown := [key for key in values if key not in known]:
        raise ValueError(
            f"Config {str(name_or_path)!r} has keys that are no flags: {with_hints(unknown, sorted(known))}. Take "
            "them out, or choose another config."
        )
    parser.set_defaults(**{name: as_typed(value) for name, value in values.items()})


def as_typed(value: Any) -> Any:
    """A value as text: a default that is text goes through the conversions and checks of what is typed."""
    return str(value) if isinstance(value, bool | int | float) else value


def with_hints(unknown: Iterable[str], known: Iterable[str]) -> str:
    """Unknown names, each with the known one that is next to it."""
    shown = []
    for name in unknown:
        close = difflib.get_close_matches(name.split("=")[0], known, n=1)
        shown.append(f"{name} (did you mean {close[0]}?)" if close else name)
    return ", ".join(shown)
