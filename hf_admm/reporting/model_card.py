"""Our part of a model card: a section and tags, added to the card that a trainer has written in its own way."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub.utils import yaml_dump

from hf_admm.console import get_logger
from hf_admm.reporting.tables import markdown_table, number_text
from hf_admm.sparsity.kinds import LayerKind, layer_kinds
from hf_admm.version import __version__


logger = get_logger(__name__)

CARD_NAME = "README.md"
BEGIN, END = "<!-- hf-admm: begin -->", "<!-- hf-admm: end -->"
_MOST_KINDS = 40

_ADMM_CITATION = """\
```bibtex
@misc{wang2024admm,
    title = {{ADMM Based Semi-Structured Pattern Pruning Framework For Transformer}},
    author = {Wang, T.},
    year = {2024},
    eprint = {2407.08334},
    archivePrefix = {arXiv}
}
```"""
_SRSTE_CITATION = """\
```bibtex
@inproceedings{zhou2021learning,
    title = {{Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch}},
    author = {Zhou, Aojun and Ma, Yukun and Zhu, Junnan and Liu, Jianbo and Zhang, Zhijie and Yuan, Kun and
              Sun, Wenxiu and Li, Hongsheng},
    booktitle = {International Conference on Learning Representations},
    year = {2021},
    eprint = {2102.04010},
    archivePrefix = {arXiv}
}
```"""
_LAYERWISE_CITATION = """\
```bibtex
@inproceedings{meng2024alps,
    title = {{ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models}},
    author = {Meng, Xiang and Behdin, Kayhan and Wang, Haoyue and Mazumder, Rahul},
    booktitle = {Advances in Neural Information Processing Systems},
    year = {2024},
    eprint = {2406.07831},
    archivePrefix = {arXiv}
}
```"""


@dataclass(frozen=True)
class CardFacts:
    """
    What a model card says of the sparsity of a model.

    Args:
        pattern (`str`), pattern_words (`str`):
            The pattern, and what it means.
        shapes (`Mapping[str, tuple[int, ...]]`):
            The shape of each sparse weight, by name.
        left_dense (`str`):
            How many matrices are dense, and why.
        share (`float`):
            The entries of the sparse weights as a share of those of all matrices.
        flags (`Mapping[str, str]`):
            The flags of both phases.
        phases (`list[tuple[str, str]]`):
            For each phase its name, and what it did.
        verification (`str`):
            What the final audit found, or that there was none yet.
        model (`str`):
            The repository or folder of the model, as users will name it.
        loader (`str`):
            Python that loads the model by that name; empty if nobody can know.
        served_as_2_4 (`bool`):
            Whether the weights are 2:4, which GPUs have kernels for.
        zeros (`float`, *optional*):
            Share of zeros in the sparse weights.
        sparse (`Mapping[str, float]`, *optional*), dense (`Mapping[str, float]`, *optional*):
            Metrics of the sparse model, and of a dense one to compare it with.
    """

    pattern: str
    pattern_words: str
    shapes: Mapping[str, tuple[int, ...]]
    left_dense: str
    share: float
    flags: Mapping[str, str]
    phases: list[tuple[str, str]]
    verification: str
    model: str
    loader: str = ""
    served_as_2_4: bool = False
    zeros: float | None = None
    sparse: Mapping[str, float] = field(default_factory=dict)
    dense: Mapping[str, float] = field(default_factory=dict)

    @property
    def tags(self) -> list[str]:
        """What the card is found by."""
        return ["hf-admm", "sparsity", self.pattern]


def add_to_card(path: str | Path, facts: CardFacts) -> None:
    """
    Adds the section and the tags to a model card. All else in it stays; a section of ours that is there is replaced.

    Args:
        path (`str` or `Path`):
            The card, a `README.md`.
        facts ([`CardFacts`]):
            What it should say.
    """
    path = Path(path)
    with open(path, encoding="utf-8-sig", newline="") as file:
        text = file.read()
    try:
        text = _tagged(text, facts.tags)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        logger.warning(
            f"The metadata of {path} can't be read ({reason}): the tags {', '.join(facts.tags)} are missing there, "
            "and the hub will refuse the card. Mend what is between its two lines of ---."
        )
    section, old = f"{BEGIN}\n\n{sparsity_section(facts)}\n\n{END}", _ours.search(text)
    if old:
        text = text[: old.start()] + section + text[old.end() :]
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        file.write(text)
    os.replace(temporary, path)


_metadata = re.compile(r"\A(?P<begin>\s*---[ \t]*\r?\n)(?P<yaml>.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_ours = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)


def _tagged(text: str, tags: list[str]) -> str:
    """The text of a card with further tags. What is in its metadata besides, the comments of a template too, stays."""
    block = _metadata.match(text)
    if block is None:
        return f"---\n{yaml_dump({'tags': tags}, sort_keys=False)}---\n\n{text.lstrip()}"
    data = yaml.safe_load(block["yaml"]) or {}
    if not isinstance(data, dict):
        raise ValueError(f"it is a {type(data).__name__}, not names with values")
    there = data.get("tags") or []
    there = [there] if isinstance(there, str) else list(there)
    data["tags"] = there + [tag for tag in tags if tag not in there]
    if data["tags"] == there:
        return text
    comments = re.match(r"(?:#[^\n]*\n)*", block["yaml"]).group()
    dumped = yaml_dump(data, sort_keys=False, line_break="\r\n" if "\r\n" in block["begin"] else "\n")
    return f"{block['begin']}{comments}{dumped}{text[block.end('yaml') :]}"


def sparsity_section(facts: CardFacts) -> str:
    """
    The section that a model card gets.

    Args:
        facts ([`CardFacts`]):
            What it should say.

    Returns:
        `str`: Markdown.
    """
    kinds = layer_kinds(facts.shapes)
    entries = sum(kind.entries for kind in kinds)
    zeros = "" if facts.zeros is None else f"; {facts.zeros:.2%} of them are zero"
    parts = [
        "## Sparsity",
        f"The model was fine-tuned with `hf-admm` {__version__} to the pattern "
        f"`{facts.pattern}`: {facts.pattern_words}. The zeros are in a plain dense checkpoint, which loads like any "
        "other.",
        markdown_table(
            ["", ""],
            [
                ["pattern", f"`{facts.pattern}`"],
                ["sparse weights", f"{len(facts.shapes)}, with {entries:,} entries{zeros}"],
                ["share of all matrices", f"{facts.share:.1%} of their entries"],
                ["left dense", facts.left_dense],
                ["verification", facts.verification],
            ],
        ),
        "### What is sparse",
        _kinds(kinds),
        "### How it was trained",
        markdown_table(["phase", ""], facts.phases),
        markdown_table(["flag", "value"], [[f"`{name}`", value] for name, value in facts.flags.items()]),
        *_metrics(facts),
        "### How to load and to serve it",
        *_usage(facts),
        *_citations(facts),
    ]
    return "\n\n".join(parts)


def _citations(facts: CardFacts) -> list[str]:
    """Of the methods by which the weights became sparse, as far as the run came."""
    parts, ended = [], any(name != "phase 1" for name, _ in facts.phases)
    if "num_calibration_samples" in facts.flags and ended:
        parts += ["Pruning by layer-wise ADMM:", _LAYERWISE_CITATION]
    if facts.flags.get("admm_rho", "0") != "0":
        parts += ["Pruning by ADMM while the model is fine-tuned:", _ADMM_CITATION]
    if facts.flags.get("srste_mask") == "dynamic" and ended:
        parts += ["Training with a mask that moves:", _SRSTE_CITATION]
    return ["### Citation", *parts] if parts else []


def _kinds(kinds: list[LayerKind]) -> str:
    shown = kinds[:_MOST_KINDS]
    rows = [[f"`{kind.name}`", str(kind.count), kind.shape_text, f"{kind.entries:,}"] for kind in shown]
    others = len(kinds) - len(shown)
    table = markdown_table(["kind of layer", "weights", "shape", "entries"], rows)
    return f"{table}\n\n... and {others} other kinds." if others else table


def _metrics(facts: CardFacts) -> list[str]:
    if not facts.sparse and not facts.dense:
        return []
    shown = ["sparse"] + (["dense"] if facts.dense else [])
    names = list(dict.fromkeys([*facts.sparse, *facts.dense]))
    by_kind = {"sparse": facts.sparse, "dense": facts.dense}
    rows = [
        [f"`{name}`", *(number_text(by_kind[kind][name]) if name in by_kind[kind] else "" for kind in shown)]
        for name in names
    ]
    what = "Of the sparse model, and of a dense one to compare it with:" if facts.dense else "Of the sparse model:"
    return ["### Metrics", what, markdown_table(["metric", *shown], rows)]


def _usage(facts: CardFacts) -> list[str]:
    parts = []
    if facts.loader:
        parts.append(f"```python\n{facts.loader}\n```")
    else:
        parts.append("It loads like any checkpoint of its class; hf-admm is not needed for that.")
    parts += ["`hf-admm` checks whether the zeros are there:", f"```bash\nhf-admm verify {facts.model}\n```"]
    if facts.served_as_2_4:
        parts += [
            "On NVIDIA GPUs from Ampere on, in float16 or bfloat16, its linear layers can run as PyTorch's "
            "semi-structured sparse tensors. Whether that is faster depends on the GPU and the shapes; "
            f"`hf-admm speed {facts.model}` measures it.",
            "```python\nimport torch\nfrom hf_admm import accelerate_inference\n\n"
            'model = model.to("cuda", torch.bfloat16).eval()\n'
            "print(accelerate_inference(model).table())\n```",
        ]
    else:
        parts.append(
            "To serve it, treat it as the dense model that it is stored as. GPUs have kernels for 2:4 alone, not for "
            f"`{facts.pattern}`; compressed, its files are small (`zstd -3 model.safetensors`)."
        )
    return parts
