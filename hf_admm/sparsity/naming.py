"""What `sparsity_include` and `sparsity_exclude` name: PEFT's convention, and names that would have no effect."""

import re
from collections.abc import Collection, Iterable, Mapping

from torch import nn

from hf_admm.sparsity.matrices import FROZEN, Matrix, how_to_fold, is_linear, named_modules


Names = list[str] | str | None


def matches(name: str, names: list[str] | str) -> bool:
    """
    PEFT's convention: whether a module name is in a list of suffixes or fully matches a regular expression.

    Args:
        name (`str`):
            Full name of a module, such as `"encoder.layer.0.attention.self.query"`.
        names (`list[str]` or `str`):
            Name suffixes (`["query", "value"]`), or one regular expression.
    """
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in names)


def check_include(known: Mapping[str, Matrix], include: Names, exclude: Names, accepted: Collection[str] = ()) -> None:
    """
    Every name must match what can be pruned, or what stays dense for an accepted reason: else a layer would silently
    stay dense.

    A linear layer that can't be pruned is refused whenever it is matched, and not excluded. What is no linear layer
    (an embedding, a convolution, experts) is refused if the name matches nothing else: `proj` may mean others too.
    """
    check_expression(include, "sparsity_include")
    check_expression(exclude, "sparsity_exclude")
    unmatched, refused = [], {}
    for entry in name_entries(include):
        found = [matrix for matrix in known.values() if any(matches(name, entry) for name in matrix.names)]
        linear = [matrix for matrix in found if matrix.linear]
        if not found:
            unmatched.append(entry)
        for matrix in linear or found:
            excluded = exclude is not None and any(matches(name, exclude) for name in matrix.names)
            if matrix.reason and matrix.reason not in accepted and not excluded:
                refused[matrix.module if matrix.linear else matrix.name] = matrix
    if unmatched:
        raise ValueError(_no_match("sparsity_include", unmatched, known))
    if refused:
        listing = "\n".join(f"  {name}: {_why(matrix)}" for name, matrix in refused.items())
        raise ValueError(
            f"sparsity_include names {len(refused)} of what can't be pruned:\n{listing}\nChange that, name others, or "
            f"leave them dense with {exclude_advice(refused, exclude)}."
        )


def check_exclude(model: nn.Module, known: Mapping[str, Matrix], exclude: Names) -> None:
    """Every name must match a layer: a typo would silently prune it. It may be one that stays dense anyway."""
    names = {name for matrix in known.values() for name in matrix.names}
    # A norm may be named too; a block of layers may not, see `matches`.
    names |= {name for name, module in named_modules(model).items() if module._parameters}
    check_expression(exclude, "sparsity_exclude")
    unmatched = [entry for entry in name_entries(exclude) if not any(matches(name, entry) for name in names)]
    if unmatched:
        raise ValueError(_no_match("sparsity_exclude", unmatched, known))


def exclude_advice(names: Iterable[str], exclude: Names) -> str:
    """The flag that leaves these dense, beside what is excluded already: given again, it replaces its value."""
    if isinstance(exclude, str):
        return f"--sparsity_exclude '{'|'.join([f'({exclude})', *map(re.escape, names)])}'"
    return f"--sparsity_exclude {' '.join([*(exclude or []), *names])}"


def name_entries(names: Names) -> list[list[str] | str]:
    """Each suffix, or the one expression, as names of their own."""
    return [names] if isinstance(names, str) else [[suffix] for suffix in names or []]


def as_names(value: list[str] | str | None) -> Names:
    """The command line passes a regular expression as a list of one; a suffix has none of these characters."""
    if isinstance(value, list | tuple) and len(value) == 1 and re.search(r"[\\^$*+?()\[\]{}|]", value[0]):
        return value[0]
    return value


def check_expression(names: Names, flag: str) -> None:
    """A string is a regular expression, and must be a valid one."""
    if isinstance(names, str):
        try:
            re.compile(names)
        except (re.error, OverflowError, RecursionError) as error:  # a{9999999999}, or thousands of brackets
            raise ValueError(f"{flag} is not a regular expression: {names!r} ({error}).") from None


def _no_match(flag: str, unmatched: list[list[str] | str], known: Mapping[str, Matrix]) -> str:
    shown = ", ".join(entry if isinstance(entry, str) else entry[0] for entry in unmatched)
    modules = {matrix.module for matrix in known.values() if is_linear(matrix.owner)}
    endings = ", ".join(sorted({module.rpartition(".")[2] for module in modules}))
    return (
        f"{flag} matches no layer with: {shown}. Give suffixes of the names of layers, or one regular expression "
        f"that matches whole names ('.*encoder.*' for all within a block). The names of this model's linear "
        f"layers end in: {endings}."
    )


def _why(matrix: Matrix) -> str:
    if matrix.fault == "parametrized":
        return f"parametrized, so its weight is computed anew in every forward pass. Fold it: {how_to_fold(matrix)}"
    if matrix.tied_to:
        return f"{matrix.reason} ({matrix.tied_to}), which would be pruned with it. Untie them"
    if matrix.reason == FROZEN:
        return "frozen. Unfreeze it: requires_grad_(True)"
    return f"{matrix.reason}. Only linear layers and nn.MultiheadAttention can be pruned"
