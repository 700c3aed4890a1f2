"""The table that a run ends with: what came out, what its phases did, where it is, and what to do next."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import TrainerState

from hf_admm.reporting.tables import format_facts, number_text


if TYPE_CHECKING:
    from hf_admm.audit_report import AuditReport

_MOST_METRICS = 6
_NO_METRICS = ("_runtime", "_per_second", "_preparation_time")


def closing_table(
    state: TrainerState,
    audit: "AuditReport",
    admm_steps: int,
    best_loaded: bool = False,
    files: Sequence[tuple[str, str]] = (),
    commands: Sequence[str] = (),
) -> str:
    """
    What came out of a run.

    Args:
        state ([`~transformers.TrainerState`]):
            Its steps and its logs.
        audit ([`AuditReport`]):
            The final audit.
        admm_steps (`int`):
            Length of phase 1.
        best_loaded (`bool`, *optional*, defaults to `False`):
            Whether the model holds the weights of its best checkpoint.
        files (`Sequence[tuple[str, str]]`, *optional*):
            What was saved, and where.
        commands (`Sequence[str]`, *optional*):
            What to run next.

    Returns:
        `str`: A table in plain text.
    """
    entries, groups = sum(weight.size for weight in audit.sparse), sum(weight.groups for weight in audit.sparse)
    seconds = next((log["train_runtime"] for log in reversed(state.log_history) if "train_runtime" in log), None)
    time = "" if seconds is None else f" and {seconds:.0f} s"
    facts = [
        ("zeros", f"{audit.sparsity:.2%} of {entries:,} entries, in {len(audit.sparse)} weights"),
        (audit.broken_label, f"{audit.violations} of {groups:,}"),
        ("metrics", _metrics(state, best_loaded)),
        *phase_figures(state, admm_steps),
        *files,
        *(("next" if at == 0 else "", command) for at, command in enumerate(commands)),
    ]
    facts[2:2] = [("left dense", f"{name} ({reason})") for name, reason in audit.released.items()]
    return f"\nhf_admm: {audit.pattern} after {state.global_step} steps{time}\n\n{format_facts(facts)}\n"


def _metrics(state: TrainerState, best_loaded: bool) -> str:
    metrics, step = final_metrics(state, best_loaded)
    if not metrics:
        return "none in training (eval_strategy, or trainer.evaluate())"
    shown = [f"{name} {number_text(value)}" for name, value in list(metrics.items())[:_MOST_METRICS]]
    hidden = len(metrics) - len(shown)
    return ", ".join(shown) + (f" and {hidden} more" if hidden else "") + f" (of the sparse weights, at step {step})"


def final_metrics(state: TrainerState, best_loaded: bool = False) -> tuple[dict[str, float], int | None]:
    """
    The metrics of the model as a run leaves it: those of an evaluation after it, else of the best checkpoint if that
    is what was loaded, else the last ones.

    Args:
        state ([`~transformers.TrainerState`]):
            Its logs.
        best_loaded (`bool`, *optional*, defaults to `False`):
            Whether the model holds the weights of its best checkpoint.

    Returns:
        `tuple[dict[str, float], int]`: Metrics by name, and their step; none, and `None`, if nothing was evaluated.
    """
    ends = [place for place, log in enumerate(state.log_history) if "train_runtime" in log]
    after = _evaluations(state.log_history[ends[-1] + 1 :] if ends else [])
    within = _evaluations(state.log_history[: ends[-1]] if ends else state.log_history)
    if after:
        step = list(after)[-1]
        return after[step], step
    if not within:
        return {}, None
    step = list(within)[-1]
    if best_loaded and state.best_global_step in within:
        step = state.best_global_step
    return within[step], step


def _evaluations(logs: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """The metrics by step; several data sets are evaluated one after the other."""
    found: dict[int, dict[str, float]] = {}
    for log in logs:
        metrics = {
            name: value
            for name, value in log.items()
            if name.startswith("eval_") and not name.endswith(_NO_METRICS) and isinstance(value, int | float)
        }
        if metrics:
            found.setdefault(log["step"], {}).update(metrics)
    return found


def phase_figures(state: TrainerState, admm_steps: int) -> list[tuple[str, str]]:
    """
    What the phases of a run came to, as far as it was logged.

    Args:
        state ([`~transformers.TrainerState`]):
            Its steps and its logs.
        admm_steps (`int`):
            Length of phase 1.

    Returns:
        `list[tuple[str, str]]`: For each phase that was trained, its name (`"training"` if there is no phase 1) and a
            line.
    """
    logs = [log for log in state.log_history if "admm/phase" in log]
    lines = []
    for number, steps in ((1, min(admm_steps, state.global_step)), (2, max(0, state.global_step - admm_steps))):
        if not steps:
            continue
        own = [log for log in logs if log["admm/phase"] == number]
        figures = _figures(number, own, [log for log in logs if log["admm/phase"] == 2])
        lines.append((f"phase {number}" if admm_steps else "training", f"{steps} steps{figures}"))
    return lines


def _figures(number: int, own: Sequence[Mapping[str, float]], second: Sequence[Mapping[str, float]]) -> str:
    texts = []
    dense = number == 1 and bool(own) and not any(log.get("admm/rho", 1) for log in own)  # nothing has pulled
    if number == 1:
        residual, cut = _last(own, "admm/primal_residual"), _last(second, "admm/switch_residual")
        if dense:
            texts.append("dense training")
        elif residual is not None:
            texts.append(f"residual {residual:.2%}")
        if cut is not None:
            texts.append(f"{cut:.2%} cut off at the switch")
    if number == 2 and (change := _last(own, "admm/output_change")) is not None:
        texts.append(f"outputs of layers changed by {change:.0%} when pruned")
    if not dense and (flips := _last(own, "admm/mask_flips")) is not None:
        texts.append(f"flips {flips:.2g}")
    return f": {', '.join(texts)}" if texts else ""


def _last(logs: Sequence[Mapping[str, float]], name: str) -> float | None:
    return next((log[name] for log in reversed(logs) if name in log), None)
