"""What the training commands share: their flags, and where a flag's value comes from."""

import dataclasses
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hf_admm.commands.help import FlagParser
from hf_admm.configs import apply_config, as_typed, with_hints
from hf_admm.visualization.drawing import is_installed


# Fine-tuning a pre-trained encoder; any of them gives way to the config and the command line.
DEFAULTS = {
    "learning_rate": 1e-4,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "num_train_epochs": 5,
    "warmup_steps": 0.06,
    "logging_steps": 50,
    "save_strategy": "no",
    "report_to": "none",
}


@dataclass
class CommandArguments:
    """
    Flags of every training command.

    Args:
        config (`str`, *optional*):
            A YAML file, or the name of a bundled recipe, whose keys are flags.
        max_train_samples (`int`, *optional*):
            Train on that many examples at most.
        max_eval_samples (`int`, *optional*):
            Evaluate on that many examples at most.
        max_seq_length (`int`, *optional*, defaults to 128):
            Longer inputs are truncated to that many tokens.
        dry_run (`bool`, *optional*, defaults to `False`):
            Print what would be pruned and stop.
        quiet (`bool`, *optional*, defaults to `False`):
            Print nothing but the final table, warnings and errors.

    Raises:
        `ValueError`: If a number is below 1.
    """

    config: str | None = field(
        default=None,
        metadata={"help": "A YAML file, or the name of a bundled recipe, whose keys are flags. Flags given here win."},
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on that many examples at most, drawn with a fixed seed."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on that many examples at most, drawn with a fixed seed."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Truncate longer inputs to that many tokens."})
    dry_run: bool = field(
        default=False, metadata={"help": "Whether to print which weights would be pruned, and stop there."}
    )
    quiet: bool = field(
        default=False,
        metadata={"help": "Whether to print the final table alone: no progress, no logs; warnings and errors stay."},
    )

    def __post_init__(self):
        for name in ("max_train_samples", "max_eval_samples", "max_seq_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} is not allowed: give a whole number of at least 1.")


Arguments = TypeVar("Arguments", bound=CommandArguments)


def with_report(defaults: dict[str, Any]) -> dict[str, Any]:
    """Defaults of a training command, by which it writes a report of its run if it can."""
    return {**defaults, "sparsity_report": is_installed()}


def parse_flags(
    argv: Sequence[str], prog: str, description: str, command_type: type[Arguments], defaults: dict[str, Any]
) -> tuple[Arguments, dict[str, Any]]:
    """
    Reads the flags of a training command. A flag's value comes from the command line, else from `--config`, else from
    the command's defaults, else from the dataclass.

    Args:
        argv (`Sequence[str]`):
            What follows the command.
        prog (`str`):
            The command, for messages.
        description (`str`):
            What the command does, for `--help`.
        command_type (`type`):
            Dataclass of the command's own flags.
        defaults (`dict[str, Any]`):
            The command's defaults.

    Returns:
        `tuple`: The command's own flags, and the values to make [`ADMMTrainingArguments`] from.

    Raises:
        `ValueError`: If a flag, a key of the config or a value is not allowed.
    """
    parser = FlagParser(command_type, prog, description)
    known = [f"--{name}" for name in parser.flags]
    parser.set_defaults(**{name: as_typed(value) for name, value in defaults.items()})
    if (config := _config(argv)) is not None:
        apply_config(parser, config)
    namespace, unknown = parser.parse_known_args(list(argv))
    if unknown:
        raise ValueError(f"{prog} does not know {with_hints(unknown, known)}.")
    parsed = vars(namespace)
    own = {item.name: parsed.pop(item.name) for item in dataclasses.fields(command_type)}
    return command_type(**own), parsed


def _config(argv: Sequence[str]) -> str | None:
    finder = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config", nargs="?")
    return finder.parse_known_args(list(argv))[0].config
