"""The table of what is pruned in each architecture.

`python tests/architecture_table.py`, run from the root of the repository, writes docs/architectures.md.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import torch

from architectures import ARCHITECTURES, Architecture
from hf_admm.sparsity.patterns import parse_pattern
from hf_admm.sparsity.targets import TargetSelection, select_targets


PAGE = Path(__file__).resolve().parent.parent / "docs" / "architectures.md"
INTRODUCTION = """\
# Architectures

What is pruned by default in each architecture that the tests train: through both phases, saved, loaded with plain
`from_pretrained` to the same logits, audited, and resumed from either phase to the same bits. `*` stands for the
number of a layer. The last column is the share of the parameters that is pruned, at the size of the default config; at
`2:4`, half of that share is zero.

- **Heads and embeddings** stay dense, and so does what maps to or from them outside the layers. A head that is tied to
  the embedding has no weight of its own.
- **GPT-2** stores its weights as `(in, out)`. Groups lie along the inputs all the same.
- **ALBERT** runs one layer many times. It is pruned once, and every run of it sees the same zeros.
- **DeBERTa-v2** has layers of their own for relative positions, unless `share_att_key` is set, as it is in DeBERTa-v3.
  They are pruned like those for the content.
- **Mixtures of experts** hold all experts of a layer in one tensor of three dimensions. Pruning these is not
  supported: they stay dense, and as they are most of such a model, next to nothing of it is pruned but its attention.
- **ViT, Mixtral, Qwen3-MoE** and some others are saved under the names of their first release. `hf-admm verify` knows
  these names, and a resume reads the weights back as `from_pretrained` does, which plain `Trainer` fails to do
  ([transformers 48805](https://github.com/huggingface/transformers/issues/48805)).

Other architectures follow the same rules; `trainer.target_table()` shows what they give. This page is written by
`python tests/architecture_table.py`.
"""


def collapse(name: str) -> str:
    """The module of a parameter, with `*` for the numbers of layers."""
    return re.sub(r"\.\d+(?=\.)", ".*", name.removesuffix(".weight"))


def shorten(names: Iterable[str]) -> list[str]:
    """The modules of parameters, joined by the module that holds them, such as `encoder.layer.*.{query,key}`."""
    holders: dict[str, list[str]] = {}
    for name in dict.fromkeys(map(collapse, names)):
        holder = name.rpartition(".")[0]
        holders.setdefault(holder or name, []).append(name)
    return [names[0] if len(names) == 1 else f"{holder}.{{{','.join(name.rpartition('.')[2] for name in names)}}}"
            for holder, names in holders.items()]  # fmt: skip


def reasons(selection: TargetSelection) -> dict[str, list[str]]:
    """The matrices that stay dense, by reason."""
    grouped: dict[str, list[str]] = {}
    for name, (_, reason) in selection.left_out.items():
        grouped.setdefault(reason, []).append(name)
    return {reason: shorten(names) for reason, names in grouped.items()}


def share(architecture: Architecture) -> str:
    """How much of the model is pruned, at the size of its default config."""
    with torch.device("meta"):
        model = architecture.model_class(architecture.model_class.config_class(**architecture.settings))
    targets = select_targets(model, parse_pattern("2:4")).targets
    pruned = sum(model.get_parameter(name).numel() for name in targets)
    total = sum(parameter.numel() for parameter in model.parameters())
    return f"{pruned / total:.0%} of {total / 1e6:,.0f} M"


def page() -> str:
    """What docs/architectures.md should hold."""

    def code(names: list[str]) -> str:
        return ", ".join(f"`{name}`" for name in names)

    lines = ["| | class | pruned | left dense | share |", "| --- | --- | --- | --- | --- |"]
    for architecture in ARCHITECTURES:
        selection = select_targets(architecture.tiny(), parse_pattern("2:4"))
        dense = "; ".join(f"{reason}: {code(names)}" for reason, names in reasons(selection).items())
        cells = (architecture.name, f"`{architecture.head}`", code(shorten(selection.targets)), dense)
        lines.append(f"| {' | '.join(cells)} | {share(architecture)} |")
    return "\n".join([INTRODUCTION, *lines, ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
