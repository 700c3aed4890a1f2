"""How each kind of method trains, and what is observed on the way."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedModel, Trainer, TrainerCallback

from benchmarks import peers
from benchmarks.study import sparsegpt
from benchmarks.study.methods import Method
from hf_admm import ADMMTrainer, ADMMTrainingArguments, parse_pattern, select_targets, sparsity_mask
from hf_admm.pruning.calibration import prune_in_blocks
from hf_admm.pruning.defaults import CALIBRATION_SAMPLES
from hf_admm.pruning.weights import PrunedWeights
from hf_admm.sparsity.patterns import NMPattern
from hf_admm.training.learning_rate import phase_scheduler


AVERAGED = 0.1  # the last part of a run whose weights are averaged


class TwoSegmentTrainer(Trainer):
    """
    Plain `Trainer` with the learning rates of a sparse run.

    Args:
        schedule ([`ADMMTrainingArguments`]):
            Those of the sparse run.
    """

    def __init__(self, *args, schedule: ADMMTrainingArguments, **kwargs):
        super().__init__(*args, **kwargs)
        self.schedule = schedule

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.lr_scheduler is None:
            in_use = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = phase_scheduler(self.schedule, in_use, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)


class SparseGPTTrainer(ADMMTrainer):
    """Ours, but for what a layer is pruned by: SparseGPT in the place of layer-wise ADMM."""

    def _prune_layer(self, weight: torch.Tensor, moments: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
        return sparsegpt.prune(weight, moments, pattern.kept, pattern.group_size)


def learning_rates(args: ADMMTrainingArguments, steps: int) -> list[float]:
    """The learning rate of each step of a run of that length, as a share of the peak of its first phase."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = phase_scheduler(args, optimizer, steps)
    multiplier = scheduler.lr_lambdas[0] if scheduler else lambda step: 1.0
    return [multiplier(step) for step in range(steps)]


class Averaging(TrainerCallback):
    """Puts the mean of the weights after each step of the last part of the run into the model at its end."""

    def __init__(self):
        self.mean: AveragedModel | None = None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step > (1 - AVERAGED) * state.max_steps:
            self.mean = self.mean or AveragedModel(model)
            self.mean.update_parameters(model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.mean is not None:
            model.load_state_dict(self.mean.module.state_dict())


class Observer(TrainerCallback):
    """
    Takes what shows whether phase 1 converged, into the run's own log: at the start and right before the switch, what
    the projection would cut off W; right before the switch, the metrics of the projected model, and a checkpoint if
    phase 2 is to be run from there again.

    Args:
        saves (`bool`):
            Whether to save that checkpoint.
        before (`Path`, *optional*):
            Where to save the model as it is before the switch, not projected.
    """

    def __init__(self, saves: bool, before: Path | None = None):
        self.saves, self.before, self.log = saves, before, None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.log({"study/cut": cut(model, args)})

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == args.phase_plan(state.max_steps).admm_steps < state.max_steps:
            self.log({"study/cut": cut(model, args)})
            if self.before is not None:
                model.save_pretrained(self.before)
            control.should_log = control.should_evaluate = True
            control.should_save = control.should_save or self.saves


@torch.no_grad()
def cut(model: torch.nn.Module, args: ADMMTrainingArguments) -> float:
    """`||W - Pi(W)|| / ||W||` over all pruned weights: what the projection would cut off now."""
    lost = whole = 0.0
    for name, target in select_targets(model, args.pattern, args.include, args.exclude).targets.items():
        weight = model.get_parameter(name).detach().float()
        lost += weight.masked_fill(sparsity_mask(weight, args.pattern, target.transposed), 0).square().sum().item()
        whole += weight.square().sum().item()
    return (lost / whole) ** 0.5 if whole else 0.0


def build(
    method: Method,
    pattern: str,
    arguments: dict,
    model: PreTrainedModel,
    encode: Callable[[Sequence[int]], dict],
    saves: bool = False,
    before: Path | None = None,
    **parts,
) -> Trainer:
    """
    A trainer that has not trained yet.

    Args:
        method ([`Method`]):
            How.
        pattern (`str`):
            To what; a dense method only takes its schedule from it.
        arguments (`dict`):
            Of `ADMMTrainingArguments`.
        model (`PreTrainedModel`):
            What to train.
        encode (`Callable`):
            A batch of the model's inputs from one training row, by its number.
        saves (`bool`, *optional*, defaults to `False`):
            Whether to save a checkpoint right before the switch.
        before (`Path`, *optional*):
            Where to save the model as it is then, not projected.
        parts:
            Of `Trainer`: `train_dataset` and the others.

    Raises:
        `ValueError`: If the method knows nothing of the pattern.
    """
    if method.kind in ("pat", "sparsegpt", "sparsegpt_in_run") and not isinstance(parse_pattern(pattern), NMPattern):
        raise ValueError(f"{method.title} prunes to N:M, not to {pattern!r}.")
    if method.kind in ("dense", "pat"):
        args = ADMMTrainingArguments(**arguments | {"sparsity_pattern": "none"})
        if method.kind == "dense":
            schedule = ADMMTrainingArguments(**arguments | {"sparsity_pattern": pattern})
            trainer = TwoSegmentTrainer(model=model, args=args, schedule=schedule, **parts)
            if method.averages:
                trainer.add_callback(Averaging())
            return trainer
        parsed = parse_pattern(pattern)
        names = list(select_targets(model, parsed).targets)
        optimizer = peers.pat_optimizer(model, names, args, parsed.kept, parsed.group_size)
        return Trainer(model=model, args=args, optimizers=(optimizer, None), **parts)
    args = ADMMTrainingArguments(**arguments | {"sparsity_pattern": pattern})
    if method.kind == "sparsegpt":
        rows = [encode([row]) for row in range(min(CALIBRATION_SAMPLES, len(parts["train_dataset"])))]
        targets = select_targets(model, args.pattern, args.include, args.exclude).targets
        prune = partial(sparsegpt.prune, kept=args.pattern.kept, group=args.pattern.group_size)
        prune_in_blocks(PrunedWeights(model, args.pattern, targets), rows, prune)
    kind = SparseGPTTrainer if method.kind == "sparsegpt_in_run" else ADMMTrainer
    trainer = kind(model=model, args=args, **parts)
    observer = Observer(saves, before)
    trainer.add_callback(observer)
    observer.log = trainer.log
    return trainer


def phase_1_figures(log: Sequence[dict], admm_steps: int, metric: str, final: float | None) -> dict | None:
    """
    How phase 1 went, from the log of a run.

    Args:
        log (`Sequence[dict]`):
            `trainer.state.log_history`.
        admm_steps (`int`):
            Length of phase 1.
        metric (`str`):
            The main metric.
        final (`float`, *optional*):
            Its value for the saved model.

    Returns:
        `dict` or `None`: `primal_start`, `primal_switch`, `flips_mean` and `flips_most` (of the updates in the last
        third of the phase), `cut_start`, `cut_switch`, `switch_metric` and `share_of_final`, each `None` where the log
        does not tell. `None` for a run without a phase 1.
    """
    if not admm_steps:
        return None
    within = [entry for entry in log if entry.get("step", 0) <= admm_steps]
    primal = [e["admm/primal_residual"] for e in within if "admm/primal_residual" in e]
    flips = [e["admm/mask_flips"] for e in within if "admm/mask_flips" in e and e["step"] > 2 / 3 * admm_steps]
    cuts = {entry["step"]: entry["study/cut"] for entry in within if "study/cut" in entry}
    judged = [e[f"eval_{metric}"] for e in within if e["step"] == admm_steps and f"eval_{metric}" in e]
    switch = judged[0] if judged else None
    return {
        "primal_start": primal[0] if primal else None,
        "primal_switch": primal[-1] if primal else None,
        "flips_mean": sum(flips) / len(flips) if flips else None,
        "flips_most": max(flips) if flips else None,
        "cut_start": cuts.get(0),
        "cut_switch": cuts.get(admm_steps),
        "switch_metric": switch,
        "share_of_final": switch / final if switch is not None and final else None,
    }
