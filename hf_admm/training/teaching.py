"""When a student is taught: in the training step, between its loss and the backward pass."""

from collections.abc import Mapping
from contextlib import contextmanager

import torch
from torch import nn
from transformers.trainer_pt_utils import find_batch_size

from hf_admm.console import get_logger
from hf_admm.training.distillation import (
    counted_tokens,
    hidden_distance,
    logits_distance,
    logits_kind,
    named_hidden_states,
    named_logits,
)
from hf_admm.training.signatures import surround
from hf_admm.training.teachers import (
    become,
    check_outputs,
    make_teacher,
    refusal,
    reports_hidden_states,
    stop_reporting,
    teach,
)
from hf_admm.training.traceless import same_randomness


logger = get_logger(__name__)


class DistillationMixin:
    """
    The part of [`ADMMTrainerMixin`] that adds a teacher's term to the loss.

    The term joins where the loss goes into the backward pass, `accelerator.backward`: computed and scaled by then,
    whoever has overridden `compute_loss` or the step, and out of the logs and of every evaluation. Hooks stand on the
    outermost model while a step runs, so that no wrapper's rules are passed by, and are gone after it.
    """

    _teacher: nn.Module | None = None
    _teacher_taken = False  # has the weights that the student had at the switch
    _teaching = False  # within a step
    _teacher_tried = False  # in a step of this training
    _reported = False  # the model gave its hidden states before this training too
    _window: torch.Tensor | None = None  # rows and tokens of an optimizer step, on all processes

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        surround(cls, DistillationMixin, {"training_step": "_taught"})

    def _check_distillation(self) -> None:
        if self.args.distill_teacher is not None and (message := refusal(self)):
            raise ValueError(message)
        if unused := self.args.unused_distillation:
            logger.warning(
                f"There is no distill_teacher: {', '.join(unused)} will have no effect. Set distill_teacher to a "
                "folder, a hub id, 'self' or 'switch', or leave them away."
            )

    def _prepare_teacher(self) -> None:
        """At the start of a training, before it loads or wraps anything."""
        self._teacher = self._window = None
        self._teacher_taken = self._teacher_tried = False
        self._distances, self._distances_of, self._distance_figures = {}, 0, {}
        self._check_distillation()
        if self.args.distill_teacher is not None:
            student = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            self._teacher, self._reported = make_teacher(student, self.args), reports_hidden_states(student)

    @property
    def _has_teacher(self) -> bool:
        """Whether there is one now: that of the switch teaches what comes after it."""
        return self._teacher is not None and (not self.args.learns_from_switch or self.sparsity.phase.number == 2)

    def _take_teacher(self) -> None:
        """Right before the switch, while the weights are dense."""
        if self._teacher is not None and self.args.learns_from_switch:
            self.sparsity.weights.reshard()
            become(self._teacher, self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
            self._teacher_taken = True

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._teacher is not None and not self._reported:
                stop_reporting(self.model)
            self._teacher = None

    # ---- The size of an optimizer step ----

    def get_batch_samples(self, *args, **kwargs):
        taken = super().get_batch_samples(*args, **kwargs)
        if self._teacher is not None:
            counts = [self._counts(batch) for batch in taken[0]]
            self._window = None
            if counts and all(count is not None for count in counts):
                self._window = sum(counts)
            if self.args.world_size > 1 and self._window is not None:
                self._window = self.accelerator.gather(self._window[None]).sum(0)
        return taken

    def _counts(self, batch) -> torch.Tensor | None:
        rows = find_batch_size(batch) if isinstance(batch, Mapping) else None
        if rows is None:
            return None
        tokens = counted_tokens(batch, self._shifts)
        tokens = torch.tensor(rows) if tokens is None else tokens.sum()
        return torch.stack([torch.tensor(rows, device=tokens.device), tokens]).to(self.args.device)

    @property
    def _shifts(self) -> bool:
        return getattr(self, "_loss_shifts_labels", False)

    # ---- A step ----

    def training_step(self, *args, **kwargs):
        with self._taught(*args, **kwargs):
            return super().training_step(*args, **kwargs)

    @contextmanager
    def _taught(self, model, inputs, *_, **__):
        # Before that of the switch has its say, the first step shows whether it can: else half of a run is spent.
        tries = self._teacher is not None and not self._has_teacher and not self._teacher_tried
        if self._teaching or not (self._has_teacher or tries):
            yield
            return
        if self.args.learns_from_switch and not self._teacher_taken and not tries:
            raise ValueError(
                "distill_teacher='switch' is the dense model that phase 1 ended with, and the checkpoint was saved "
                "after that by a run that had no such teacher. Resume from phase 1, or give another teacher or none."
            )
        calls, hidden = [], self.args.hidden_weight > 0
        # Before the step changes it: some trainers take the labels out.
        batch = dict(inputs) if isinstance(inputs, Mapping) else {}

        def ask(module, args, kwargs):
            return (args, {**kwargs, "output_hidden_states": True}) if hidden and torch.is_grad_enabled() else None

        def keep(module, args, kwargs, outputs):
            if torch.is_grad_enabled():  # not the passes of a generation, or of a reference
                calls.append((args, kwargs, outputs))

        accelerator = self.accelerator
        inner, before = accelerator.backward, vars(accelerator).get("backward")

        def backward(loss, *args, **kwargs):
            if not calls:
                raise ValueError(
                    f"{type(self).__name__}.compute_loss did not call the model that it was given, so there is "
                    "nothing to distil. Call `model`, not `self.model`, or leave distill_teacher away."
                )
            if tries:
                with same_randomness(self._teacher, self.args.device), torch.no_grad():
                    self._with_distance(loss, calls, batch)
                self._distances, self._distances_of, self._teacher_tried = {}, 0, True
            else:
                loss = self._with_distance(loss, calls, batch)
            calls.clear()
            return inner(loss, *args, **kwargs)

        handles = [
            model.register_forward_pre_hook(ask, with_kwargs=True),
            model.register_forward_hook(keep, with_kwargs=True),
        ]
        self._teaching, accelerator.backward = True, backward
        try:
            yield
            if calls:
                raise ValueError(
                    f"{type(self).__name__}.training_step did not hand its loss to self.accelerator.backward, so the "
                    "teacher had no say. Call it, or leave distill_teacher away."
                )
        except BaseException:
            self._distances, self._distances_of = {}, 0  # of a step that is not taken
            raise
        finally:
            self._teaching = False
            if before is None:
                del accelerator.backward
            else:
                accelerator.backward = before
            for handle in handles:
                handle.remove()

    def _with_distance(self, loss: torch.Tensor, calls: list, batch: Mapping) -> torch.Tensor:
        share, added, parts = self.args.distill_logits_weight, 0.0, {}
        by_rows, by_tokens = self._shares(batch)
        for args, kwargs, ours in calls:
            theirs = teach(self._teacher, args, kwargs, self.accelerator.autocast)
            if share:
                distance = self._logits_distance(ours, theirs, kwargs, batch, by_rows, by_tokens) / len(calls)
                parts["logits"] = parts.get("logits", 0.0) + distance.detach()
                added = added + share * distance
            if self.args.hidden_weight:
                distance = _hidden_distance(ours, theirs, kwargs) * (by_rows / len(calls))
                parts["hidden"] = parts.get("hidden", 0.0) + distance.detach()
                added = added + self.args.hidden_weight * distance
        for name, value in {"loss": added.detach(), **parts}.items():
            self._distances[name] = self._distances.get(name, 0.0) + value
        self._distances_of += bool(self.accelerator.sync_gradients)
        return ((1 - share) * loss if share else loss) + added

    def _shares(self, batch: Mapping) -> tuple:
        """
        What part of its optimizer step a batch is, in rows and in tokens. Processes are averaged over, so each counts
        as many times as there are processes.
        """
        counts = self._counts(batch)
        if self._window is None or counts is None:
            share = 1 / getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
            return share, share
        return (counts * self.args.world_size / self._window.clamp(min=1)).unbind()

    def _logits_distance(self, ours, theirs, kwargs, batch, by_rows, by_tokens) -> torch.Tensor:
        ours, theirs = named_logits(_named(ours)), named_logits(_named(theirs))
        check_outputs(ours, theirs, "logits", "distill_logits_weight")
        problem = getattr(self._student_config(), "problem_type", None)
        distances = []
        for name, logits in ours.items():
            if logits.ndim not in (2, 3):
                raise ValueError(
                    f"The {name} of {type(self._teacher).__name__} have {logits.ndim} dimensions: only classes of "
                    "rows and of tokens can be distilled. Set distill_logits_weight=0."
                )
            pair, kind, part = (logits, theirs[name]), logits_kind(logits, problem), by_rows
            counts = counted_tokens(batch, self._shifts) if logits.ndim == 3 else None
            if counts is not None and counts.shape == logits.shape[:2]:
                counts, part = counts.to(logits.device), by_tokens
                pair = tuple(each[counts] for each in pair)
            elif name in ("start_logits", "end_logits") and "attention_mask" in kwargs:  # the classes are tokens
                padding = kwargs["attention_mask"] == 0
                if padding.shape == logits.shape:
                    pair = tuple(each.float().masked_fill(padding, -1e4) for each in pair)
            distances.append(logits_distance(*pair, self.args.distill_temperature, kind) * part)
        return sum(distances) / len(distances)

    def _student_config(self):
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False).config

    # ---- The logs ----

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        if self.control.should_log and self._teacher is not None and self._distances_of:
            names = sorted(self._distances)
            sums = torch.stack([self._distances[name].to(self.args.device) for name in names])
            if self.args.world_size > 1:
                sums = self.accelerator.gather(sums[None]).mean(0)
            figures = (sums / self._distances_of).tolist()
            self._distance_figures = {f"distill/{name}": figure for name, figure in zip(names, figures, strict=True)}
            self._distances, self._distances_of = {}, 0
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self._has_teacher:
            logs |= self._distance_figures
        super().log(logs, *args, **kwargs)


def _hidden_distance(ours: Mapping, theirs: Mapping, kwargs: Mapping) -> torch.Tensor:
    ours, theirs = named_hidden_states(_named(ours)), named_hidden_states(_named(theirs))
    check_outputs(ours, theirs, "hidden states", "distill_hidden_weight")
    total = 0.0
    for name, states in ours.items():
        mask = kwargs.get("attention_mask")
        if name == "decoder_hidden_states":
            labels = kwargs.get("labels")
            mask = kwargs.get("decoder_attention_mask")
            mask = labels != -100 if mask is None and labels is not None else mask
        total = total + hidden_distance(states, theirs[name], mask)
    return total


def _named(outputs) -> Mapping:
    if not isinstance(outputs, Mapping):
        raise ValueError(
            f"The model returned a {type(outputs).__name__}, in which nothing has a name to distil by. Set "
            "return_dict=True, or leave distill_teacher away."
        )
    return outputs
