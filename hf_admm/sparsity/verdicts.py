"""What was decided on each weight of a model: pruned or not, why, and in which words that is said."""

import math
from collections import Counter
from dataclasses import dataclass


# Less than this share of a model's matrices is worth a warning.
_SMALL_SHARE = 0.1


@dataclass(frozen=True)
class Target:
    """
    A weight to prune.

    Args:
        name (`str`):
            Name of the parameter, as in `model.named_parameters()`.
        shape (`tuple[int, ...]`):
            Shape as stored: of two sides, but for convolutions and experts with a mask of their own.
        transposed (`bool`):
            Whether it is stored as `(in_features, out_features)`, as GPT-2's `Conv1D` does.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool


@dataclass(frozen=True)
class TargetSelection:
    """
    What [`select_targets`] decided on each matrix of a model.

    Args:
        targets (`dict[str, Target]`):
            The weights to prune, by parameter name, in the order of the model.
        left_out (`dict[str, tuple[tuple[int, ...], str]]`):
            Shape and reason for each matrix that stays dense.
    """

    targets: dict[str, Target]
    left_out: dict[str, tuple[tuple[int, ...], str]]

    def table(self) -> str:
        """A plain-text table: name, shape, pruned or why not, and a summary line."""
        rows = [(name, target.shape, "pruned") for name, target in self.targets.items()]
        rows += [(name, shape, reason) for name, (shape, reason) in self.left_out.items()]
        cells = [("weight", "shape", "pruned or why not")]
        cells += [(name, "x".join(map(str, shape)), reason) for name, shape, reason in rows]
        widths = [max(len(row[column]) for row in cells) for column in range(2)]
        lines = [f"{name:<{widths[0]}}  {shape:>{widths[1]}}  {reason}" for name, shape, reason in cells]
        return "\n".join([*lines, self.summary(), *filter(None, [self.warning()])])

    def summary(self) -> str:
        """One line: how many weights are pruned and their share of all, and how many are not, by reason."""
        pruned, _ = self._entries()
        share = f"{pruned:,} entries, {self.share():.1%} of all matrices"
        return f"{len(self.targets)} weights pruned ({share}); left dense: {self.reasons()}"

    def share(self) -> float:
        """The entries of the pruned weights as a share of those of all matrices."""
        pruned, total = self._entries()
        return pruned / max(total, 1)

    def reasons(self) -> str:
        """How many matrices stay dense for each reason: `"1 head, 3 embedding"`, or `"none"`."""
        reasons = Counter(reason for _, reason in self.left_out.values())
        return ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none"

    def warning(self) -> str | None:
        """What should be said if next to nothing of the model is pruned: what is left out, and what can be done."""
        pruned, total = self._entries()
        if pruned >= _SMALL_SHARE * total:
            return None
        sizes: Counter[str] = Counter()
        for shape, reason in self.left_out.values():
            sizes[reason] += math.prod(shape)
        listing = ", ".join(f"{reason} ({size / total:.1%})" for reason, size in sizes.most_common())
        return (
            f"Only {pruned / total:.1%} of the entries of this model's matrices are pruned: it stays nearly as dense "
            f"as it was. Left out, the largest first: {listing}. Linear layers and nn.MultiheadAttention alone can be "
            "pruned. Those left out can be named with sparsity_include, unfrozen with requires_grad_(True), or no "
            "longer excluded."
        )

    def _entries(self) -> tuple[int, int]:
        """The entries that are pruned, and those of all matrices."""
        pruned = sum(math.prod(target.shape) for target in self.targets.values())
        return pruned, pruned + sum(math.prod(shape) for shape, _ in self.left_out.values())
