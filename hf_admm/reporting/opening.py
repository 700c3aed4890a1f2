"""The table that a run begins with: what is pruned, by kind of layer, and what the phases will do."""

from hf_admm.pruning.state import ADMMState
from hf_admm.reporting.settings import pattern_words, phase_words
from hf_admm.reporting.tables import format_facts, format_table, shortened, size_text
from hf_admm.sparsity.kinds import layer_kinds
from hf_admm.sparsity.own import OwnSelection
from hf_admm.training.distillation_arguments import SELF, SWITCH


MOST_KINDS = 12
_NAME_WIDTH = 44


def opening_table(args, state: ADMMState, max_steps: int, step: int = 0, model_name: str = "the model") -> str:
    """
    What a run is about to do.

    Args:
        args ([`ADMMTrainingArguments`]):
            Its arguments.
        state ([`ADMMState`]):
            Its state, on the live model.
        max_steps (`int`):
            Its length, in optimizer steps.
        step (`int`, *optional*, defaults to 0):
            The steps that are done, in a resumed run.
        model_name (`str`, *optional*, defaults to `"the model"`):
            What the model is called.

    Returns:
        `str`: A table in plain text.
    """
    selection, settings = state.selection, args.phase_settings(max_steps)
    resumed = f", resumed after step {step}" if step else ""
    lines = [f"hf_admm: {model_name} to {args.pattern} in {max_steps} steps{resumed}"]
    if selection.targets:
        lines += ["", kinds_table({name: target.shape for name, target in selection.targets.items()})]
    lines.append("")
    memory = list(map(size_text, state.bytes_beside(settings).values()))
    if settings.plan.admm_steps:
        memory = [f"{size} in phase {number}" for number, size in enumerate(memory, 1)]
    place = "in CPU memory" if settings.offload and _on_gpu(state) else "beside the weights"
    chosen = [
        ("pruned", f"{selection.share():.1%} of the entries of all matrices"),
        ("left dense", selection.reasons()),
    ]
    facts = [
        ("pattern", pattern_words(args.pattern)),
        *(selection.facts() if isinstance(selection, OwnSelection) else chosen),
        *phase_words(args, max_steps),
        ("memory", f"{' and '.join(memory)} {place}, on this process"),
    ]
    if args.distill_teacher is not None:
        own = {SELF: "the dense model of the start", SWITCH: "the dense model that phase 1 ends with"}
        facts.append(("teacher", own.get(args.distill_teacher, args.distill_teacher)))
    return "\n".join([*lines, format_facts(facts), ""])


def kinds_table(shapes: dict[str, tuple[int, ...]]) -> str:
    """
    The pruned weights by kind of layer.

    Args:
        shapes (`dict[str, tuple[int, ...]]`):
            The shape of each weight, by name.

    Returns:
        `str`: A table in plain text, with the largest kinds where there are many, and a total.
    """
    kinds = layer_kinds(shapes)
    rows = [_row(shortened(kind.name, _NAME_WIDTH), kind.count, kind.entries, kind.shape_text) for kind in kinds]
    if len(kinds) > MOST_KINDS:
        shown = sorted(sorted(range(len(kinds)), key=lambda at: -kinds[at].entries)[: MOST_KINDS - 1])
        others = [kind for at, kind in enumerate(kinds) if at not in shown]
        rows = [rows[at] for at in shown]
        count, entries = sum(kind.count for kind in others), sum(kind.entries for kind in others)
        rows.append(_row(f"{len(others)} other kinds", count, entries))
    rows.append(_row("total", len(shapes), sum(kind.entries for kind in kinds)))
    return format_table(["kind of layer", "weights", "shape", "entries"], rows)


def _row(name: str, count: int, entries: int, shape: str = "") -> list[str]:
    return [name, str(count), shape, f"{entries:,}"]


def _on_gpu(state: ADMMState) -> bool:
    return any(part.is_cuda for _, part in state.weights.local())
