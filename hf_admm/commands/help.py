"""`--help` of the training commands: their own flags and the dozen of `Trainer` that everybody uses; `--help_all`."""

import dataclasses
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter
from collections.abc import Iterable
from typing import NoReturn

from transformers import HfArgumentParser, TrainingArguments

from hf_admm.arguments import ADMMTrainingArguments


# Of the flags of `TrainingArguments`, those that `--help` shows, in this order.
COMMON_FLAGS = (
    "output_dir",
    "num_train_epochs",
    "learning_rate",
    "warmup_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "eval_strategy",
    "save_strategy",
    "load_best_model_at_end",
    "bf16",
    "seed",
    "resume_from_checkpoint",
)
# Our own flags by the beginning of their names.
_SECTIONS = {
    "what is pruned": ("sparsity_",),
    "phase 1, ADMM": ("admm_",),
    "phase 2, SR-STE": ("num_calibration_", "srste_", "mask_"),
    "distillation": ("distill_",),
}
_MOST_CHOICES = 5


class FlagParser(HfArgumentParser):
    """
    The parser of a training command. Raises where argparse would print a usage of two hundred flags and exit.

    Args:
        command_type (`type`):
            Dataclass of the command's own flags.
        prog (`str`):
            The command, for messages.
        description (`str`):
            What the command does.
    """

    def __init__(self, command_type: type, prog: str, description: str):
        super().__init__(
            (command_type, ADMMTrainingArguments),
            prog=prog,
            description=description,
            usage=f"{prog} [FLAGS]",
            allow_abbrev=False,
            formatter_class=_Formatter,
        )
        self.add_argument("--help_all", action=_HelpAll, nargs=0, default=SUPPRESS, help="Show every flag, and exit.")
        # What a command has of its own stands before what all commands have.
        shared = [name for name in vars(command_type.__base__).get("__dataclass_fields__", ())]
        names = [field.name for field in dataclasses.fields(command_type)]
        self._own = sorted(names, key=lambda name: name in shared)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. See {self.prog} --help.")

    @property
    def flags(self) -> set[str]:
        """The names of the flags that have a value."""
        return {action.dest for action in self._actions if action.dest not in ("help", "help_all", SUPPRESS)}

    def format_help(self, everything: bool = False) -> str:
        """What `--help` prints, or `--help_all`."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, (), ())
        formatter.add_text(self.description)
        for title, names in self._sections(everything):
            actions = [action for name in names for action in self._actions if _shown(action) and action.dest == name]
            if actions:
                formatter.start_section(title)
                formatter.add_arguments(actions)
                formatter.end_section()
        if not everything:
            formatter.add_text(f"{self.prog} --help_all shows the others, those of transformers.TrainingArguments.")
        return formatter.format_help()

    def _sections(self, everything: bool) -> Iterable[tuple[str, list[str]]]:
        inherited = [field.name for field in dataclasses.fields(TrainingArguments)]
        known = {*inherited, *self._own}
        ours = [field.name for field in dataclasses.fields(ADMMTrainingArguments) if field.name not in known]
        yield "this command", [*self._own, "help", "help_all"]
        for title, beginnings in _SECTIONS.items():
            yield title, [name for name in ours if name.startswith(beginnings)]
        placed = tuple(beginning for beginnings in _SECTIONS.values() for beginning in beginnings)
        yield "other flags of sparse training", [name for name in ours if not name.startswith(placed)]
        yield "training", list(COMMON_FLAGS)
        if everything:
            others = [name for name in inherited if name not in COMMON_FLAGS]
            yield "all other flags of transformers.TrainingArguments", others


def _shown(action: Action) -> bool:
    """A switch that is on by default has a second flag that turns it off, `--no_...`: one of the two will do."""
    return not any(option.startswith(("--no_", "--no-")) for option in action.option_strings)


class _HelpAll(Action):
    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.format_help(everything=True))
        parser.exit()


class _Formatter(ArgumentDefaultsHelpFormatter):
    """A line for each flag where it fits: one spelling, a short name for its value, a default only if there is one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34)

    def _format_action_invocation(self, action: Action) -> str:
        if action.dest == "help":
            return "-h, --help"
        option = action.option_strings[0]
        if action.nargs == 0 or action.const is True:
            return option
        if action.choices and len(list(action.choices)) <= _MOST_CHOICES:
            value = "{" + ",".join(str(getattr(choice, "value", choice)) for choice in action.choices) + "}"
        else:
            value = {int: "N", float: "X"}.get(action.type, "NAME")
        return f"{option} {value}{' ...' if action.nargs == '+' else ''}"

    def _get_help_string(self, action: Action) -> str:
        if action.default in (None, False, "", SUPPRESS, "False"):
            return action.help or ""
        return super()._get_help_string(action) or ""
