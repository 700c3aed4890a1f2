"""Trainers whose methods take other arguments than `Trainer`: what was given, by name, handed on as it was."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any


class GivenArguments:
    """
    The arguments of a call that go on to the next class, whatever it calls them and wherever it has them.

    Args:
        owner (`type`):
            The class of the object.
        after (`type`):
            The class that hands on: the next method is looked for behind it.
        method (`str`):
            Name of the method.
        args (`tuple`):
            What was given by position.
        kwargs (`Mapping[str, Any]`):
            What was given by name.
    """

    def __init__(self, owner: type, after: type, method: str, args: tuple, kwargs: Mapping[str, Any]):
        self.args, self.kwargs = tuple(args), dict(kwargs)
        self._positional, self._sure = parameters_after(owner, after, method)

    def get(self, name: str, default: Any = None) -> Any:
        """The value of an argument, or `default` if it was not given."""
        if name in self.kwargs:
            return self.kwargs[name]
        index = self._positional.index(name) if name in self._positional else len(self.args)
        return self.args[index] if index < len(self.args) else default

    def first(self, default: Any = None) -> Any:
        """The value of the first argument, however it is called."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()), default)

    def takes(self, name: str) -> bool:
        """Whether an argument of this name can be given: it was, or the next method that names any has it."""
        return name in self.kwargs or name in self._sure

    def put(self, name: str, value: Any) -> None:
        """Gives an argument another value: where it was given, else by name."""
        index = self._positional.index(name) if name in self._positional else len(self.args)
        if name not in self.kwargs and index < len(self.args):
            self.args = (*self.args[:index], value, *self.args[index + 1 :])
        else:
            self.kwargs[name] = value


def parameters_after(owner: type, after: type, method: str) -> tuple[list[str], set[str]]:
    """
    The parameters of a method as the classes behind one have it. What a class takes as `*args` or `**kwargs` are the
    parameters of those behind it.

    Args:
        owner (`type`):
            The class of the object.
        after (`type`):
            The class to look behind.
        method (`str`):
            Name of the method.

    Returns:
        `tuple[list[str], set[str]]`: The names by position, and those that may be given by name for certain: a method
        with arguments by position of its own may have a value for what it takes as `**kwargs`.
    """
    positional: list[str] = []
    by_name: set[str] = set()
    sure: set[str] = set()
    by_place, certain = True, True
    mro = owner.__mro__
    for cls in mro[mro.index(after) + 1 :]:
        if cls is object or not callable(vars(cls).get(method)):
            continue
        parameters = list(inspect.signature(vars(cls)[method]).parameters.values())[1:]
        kinds = {parameter.kind for parameter in parameters}
        named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        placed = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if by_place:
            positional += [name for name in placed if name not in {*positional, *by_name}]
        if certain:
            sure |= named
        by_name |= named
        by_place = by_place and inspect.Parameter.VAR_POSITIONAL in kinds
        certain = certain and inspect.Parameter.VAR_KEYWORD in kinds and not placed
        if not by_place and inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return positional, sure


def show_arguments(cls: type, after: type) -> None:
    """
    Gives a class an `__init__` that shows the arguments of the one that it is mixed into, to `inspect.signature` and
    whoever else looks. It does what the inherited one does.

    Args:
        cls (`type`):
            The class, in its `__init_subclass__`.
        after (`type`):
            The mixin.
    """
    inherited = cls.__init__
    if inherited is not vars(after)["__init__"] and not hasattr(inherited, "_shows"):
        return  # a subclass has one of its own
    mro = cls.__mro__
    shown = next(vars(base)["__init__"] for base in mro[mro.index(after) + 1 :] if "__init__" in vars(base))

    @functools.wraps(shown)
    def __init__(self, *args, **kwargs):
        super(cls, self).__init__(*args, **kwargs)

    __init__.__qualname__, __init__.__module__, __init__._shows = f"{cls.__qualname__}.__init__", cls.__module__, True
    cls.__init__ = __init__


def surround(cls: type, before: type, around: Mapping[str, str]) -> None:
    """
    Surrounds the methods that a class, or one mixed into it, overrides by what has to happen before and after them,
    whether or not they call `super()`.

    Args:
        cls (`type`):
            The class, in its `__init_subclass__`.
        before (`type`):
            The class whose methods they override.
        around (`Mapping[str, str]`):
            For the name of each method, that of the method which returns a context manager, given the same arguments.
    """
    for name, manager in around.items():
        owner = next(base for base in cls.__mro__ if name in vars(base) or base is before)
        method = vars(owner).get(name)
        if owner is cls and inspect.isfunction(method):
            setattr(cls, name, _surrounded(method, manager))
        elif not issubclass(owner, before) and inspect.isfunction(method):  # it has not been surrounded yet
            setattr(cls, name, _surrounded(_handing_on(cls, name, method), manager))


def _handing_on(cls: type, name: str, method: Callable) -> Callable:
    @functools.wraps(method)
    def call(self, *args, **kwargs):
        return getattr(super(cls, self), name)(*args, **kwargs)

    return call


def _surrounded(method: Callable, manager: str) -> Callable:
    @functools.wraps(method)
    def call(self, *args, **kwargs):
        with getattr(self, manager)(*args, **kwargs):
            return method(self, *args, **kwargs)

    return call
