"""The flags of distillation."""

from dataclasses import dataclass, field


SELF, SWITCH = "self", "switch"
OWN = (SELF, SWITCH)  # the model that is trained, at an earlier moment
DISTILL_REALS = ("distill_logits_weight", "distill_hidden_weight", "distill_temperature")
# The dense model of the start knows what language is, and nothing of the task: it holds hidden states a little.
_HIDDEN_WEIGHT = {True: 0.1, False: 1.0}


@dataclass(kw_only=True)
class DistillationArgumentsMixin:
    """
    The flags of distillation: [`ADMMArgumentsMixin`] has them.

    Args:
        distill_teacher (`str`, *optional*):
            A model of the student's class to learn from, as a folder or an id of the hub; `"self"`, the dense model as
            it was when training started; or `"switch"`, the dense model that phase 1 ends with, which teaches phase 2.
            By default there is none.
        distill_logits_weight (`float`, *optional*, defaults to `0.0`):
            Share of the teacher's logits in the loss: with `h` here, `(1 - h) * task + h * T^2 * KL`, or the squared
            error for a regression.
        distill_hidden_weight (`float`, *optional*):
            Weight of the distance of the hidden states, which is added. `None` takes 1, and 0.1 for `"self"`.
        distill_temperature (`float`, *optional*, defaults to `2.0`):
            T, which divides the logits of both.
    """

    distill_teacher: str | None = field(
        default=None,
        metadata={
            "help": "Model to learn from: a folder or hub id, loaded with the student's class, 'self' (the dense "
            "model as it was when training started) or 'switch' (the dense model that phase 1 ends with)."
        },
    )
    distill_logits_weight: float = field(
        default=0.0, metadata={"help": "Share h of the teacher's logits in the loss: (1 - h) * task + h * T^2 * KL."}
    )
    distill_hidden_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the distance of the hidden states. By default 1, and 0.1 for the teacher 'self'."
        },
    )
    distill_temperature: float = field(default=2.0, metadata={"help": "Temperature T of both models' logits."})

    @property
    def learns_from_switch(self) -> bool:
        """Whether the model of the switch is the teacher, so that there is none in phase 1."""
        return self.distill_teacher == SWITCH

    @property
    def hidden_weight(self) -> float:
        """`distill_hidden_weight`, or the default for the teacher."""
        if self.distill_hidden_weight is not None:
            return self.distill_hidden_weight
        return _HIDDEN_WEIGHT[self.distill_teacher == SELF]

    @property
    def unused_distillation(self) -> list[str]:
        """The flags that were given another value and have no effect, since there is no teacher."""
        fields = DistillationArgumentsMixin.__dataclass_fields__
        changed = [name for name in DISTILL_REALS if getattr(self, name) != fields[name].default]
        return changed if self.distill_teacher is None else []
