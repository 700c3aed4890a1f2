"""Classes of arguments that several bases give their fields to, and which of them a trainer takes."""

import copy
import dataclasses
import inspect
import sys
import typing

from transformers import Trainer, TrainingArguments


def inherit_fields(cls: type) -> None:
    """
    Gives a class the fields of all of its bases, each as the class nearest to it in the order of inheritance declares
    it. A dataclass would take each base whole: one that changes nothing of `TrainingArguments` would bring back the
    defaults that another base has changed.

    Works before the decorator `dataclass` and without it: [`finish_dataclass`] makes up for a missing one.

    Args:
        cls (`type`):
            The class, in its `__init_subclass__`.
    """
    if sum(map(dataclasses.is_dataclass, cls.__bases__)) < 2:
        return  # the ordinary rules do
    own, nearest, usual = inspect.get_annotations(cls), {}, {}
    for base in reversed(cls.__mro__[1:]):
        fields = vars(base).get("__dataclass_fields__", {})
        usual |= fields
        nearest |= {name: fields[name] for name in inspect.get_annotations(base) if name in fields}
    changed = {name: field for name, field in nearest.items() if name not in own and field is not usual[name]}
    if changed:
        hints = {}
        if any(isinstance(field.type, str) for field in changed.values()):
            hints = typing.get_type_hints(cls)  # each in the module of its class, which is not this one's
        cls.__annotations__ = {**own, **{name: hints.get(name, field.type) for name, field in changed.items()}}
        for name, field in changed.items():
            setattr(cls, name, copy.copy(field))
    # Its fields are to be seen before an instance is made, by HfArgumentParser. The decorator may yet come, and takes
    # the attributes of the class for its defaults: they are put back.
    declared = {name: vars(cls)[name] for name in inspect.get_annotations(cls) if name in vars(cls)}
    doc = cls.__doc__
    dataclasses.dataclass(init=False, repr=False, eq=False, match_args=False)(cls)
    cls.__doc__ = doc
    for name, default in declared.items():
        setattr(cls, name, default)


def finish_dataclass(cls: type) -> None:
    """
    Makes a class of several bases a dataclass if it was not decorated as one: its `__init__` would be that of its
    first base.

    Args:
        cls (`type`):
            The class, when an instance is about to be made.
    """
    if "__dataclass_fields__" in vars(cls) and "__init__" not in vars(cls):
        dataclasses.dataclass(cls)


def passes_by(cls: type, mixin: type) -> bool:
    """
    Whether the `__post_init__` of a mixin is not called: that of `TrainingArguments` calls none behind it.

    Args:
        cls (`type`):
            The class.
        mixin (`type`):
            The mixin.

    Returns:
        `bool`: Whether it is not, nor that of a class whose `__post_init__` does the same, marked `goes_on`.
    """
    mro = cls.__mro__
    if TrainingArguments not in mro or mro.index(mixin) < mro.index(TrainingArguments):
        return False
    return not any(hasattr(vars(base).get("__post_init__"), "goes_on") for base in mro)


def arguments_class(trainer_class: type, after: type) -> tuple[type, bool]:
    """
    The class of arguments that a trainer is made for.

    Args:
        trainer_class (`type`):
            The class of the trainer.
        after (`type`):
            Its bases behind this one say what it takes; those before it may have a `training_args_class` that extends
            that, as the ready trainers do.

    Returns:
        `tuple[type, bool]`: The class, `TrainingArguments` if nothing says another; and whether the trainer declares
        that it takes no other, which a similar name does not.
    """
    mro = trainer_class.__mro__
    wanted, only = _taken(mro[mro.index(after) + 1 :])
    for cls in mro[: mro.index(after)]:
        ready = vars(cls).get("training_args_class")
        if _is_special(ready) and issubclass(ready, wanted):
            return ready, only
    return wanted, only


def _taken(bases: tuple[type, ...]) -> tuple[type, bool]:
    for cls in bases:
        if cls is Trainer:
            break
        declared = vars(cls).get("training_args_class")  # Sentence Transformers
        if _is_special(declared):
            return declared, True
        init = vars(cls).get("__init__")
        annotated = _annotated(init) if init is not None else ()
        special = [kind for kind in annotated if _is_special(kind)]
        if special:
            return special[0], TrainingArguments not in annotated
        if named := _named_alike(cls):
            return named, False
    return TrainingArguments, False


def wrong_arguments(trainer_class: type, args, wanted: type, mixin: type) -> str | None:
    """
    Why arguments do not fit a trainer, with the lines that make a class of those that do.

    Args:
        trainer_class (`type`):
            The class of the trainer.
        args:
            What it was given.
        wanted (`type`):
            The class of arguments that it is made for.
        mixin (`type`):
            The mixin with the sparsity flags.

    Returns:
        `str`: The message; `None` if they fit, or are none that can be told.
    """
    if not isinstance(args, TrainingArguments):
        return None
    given, missing = type(args), [name for name in _names(wanted) if not hasattr(args, name)]
    if hasattr(args, "sparsity_pattern"):
        if not missing:
            return None
        fault = f"which lack what it needs of {wanted.__name__}: {', '.join(missing)}"
    else:
        fault = "which have no sparsity flags"
        wanted = given if issubclass(given, wanted) else wanted
    advice = "Pass hf_admm.ADMMTrainingArguments"
    if issubclass(wanted, mixin):
        advice = f"Pass {wanted.__module__}.{wanted.__name__}"
    elif wanted is not TrainingArguments:
        advice = (
            f"Define a class that has both and pass one of these:\n\n    @dataclass\n"
            f"    class ADMM{wanted.__name__}({mixin.__name__}, {wanted.__name__}): ..."
        )
        advice += f"\n\nwith `from hf_admm import {mixin.__name__}` and `from dataclasses import dataclass`"
    return f"{trainer_class.__name__} got args of type {given.__name__}, {fault}. {advice}."


def _names(wanted: type) -> list[str]:
    return [field.name for field in dataclasses.fields(wanted)]


def _is_special(kind) -> bool:
    return inspect.isclass(kind) and issubclass(kind, TrainingArguments) and kind is not TrainingArguments


def _annotated(init) -> tuple:
    """The types that an `__init__` allows for `args`; names that can't be looked up are left out."""
    init = inspect.unwrap(init)
    hint = getattr(init, "__annotations__", {}).get("args")
    if isinstance(hint, str):
        names = [name.strip().removeprefix("Optional[").rstrip("]").strip("'\"") for name in hint.split("|")]
        module = getattr(init, "__globals__", {})
        return tuple(kind for name in names if (kind := module.get(name.rpartition(".")[2])) is not None)
    return typing.get_args(hint) or (hint,)


def _named_alike(cls: type) -> type | None:
    """`Seq2SeqTrainingArguments` for `Seq2SeqTrainer`: where it is defined, or in the package that it is part of."""
    stem = cls.__name__.removesuffix("Trainer")
    if not stem or stem == cls.__name__:
        return None
    for module in (cls.__module__, cls.__module__.partition(".")[0]):
        for ending in ("TrainingArguments", "Config", "Arguments"):
            found = getattr(sys.modules.get(module), stem + ending, None)
            if _is_special(found):
                return found
    return None
