"""Short training runs for the tests of the trainer."""

import pytest
import torch
from packaging.version import Version
from transformers import TrainerCallback

from hf_admm import ADMMTrainer, ADMMTrainingArguments


STEPS = 12
# Both phases in a few steps, with two updates of Z and U.
SETTINGS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "admm_steps": 6,
    "admm_update_steps": 2,
    "admm_rho": 0.1,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}

# Under torch 2.6, a compiled BERT of transformers 5.6 fails or gives no hidden states, whoever trains it.
compiles = pytest.mark.skipif(Version(torch.__version__) < Version("2.7"), reason="needs torch 2.7")


def prepare(model, data, folder, trainer_class=ADMMTrainer, callbacks=None, parts=None, **flags):
    """A trainer that has not trained yet. `parts` go to the trainer, `flags` to its arguments."""
    args = ADMMTrainingArguments(output_dir=str(folder), **{**SETTINGS, "save_strategy": "no", **flags})
    parts = dict(parts or {})
    if "eval_dataset" not in parts:  # a stream can't be cut
        parts["eval_dataset"] = data[:16]
    return trainer_class(model=model, args=args, train_dataset=data, callbacks=callbacks, **parts)


def train(*args, **kwargs):
    """The trainer that [`prepare`] makes, trained."""
    trainer = prepare(*args, **kwargs)
    trainer.train()
    return trainer


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_weights(model, expected):
    for name, weight in expected.items():
        assert torch.equal(model.get_parameter(name), weight), name


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


class Recorder(TrainerCallback):
    """Copies of what a run looks like from the inside, taken at one event."""

    def __init__(self, event, take):
        self.seen = []
        setattr(self, event, lambda args, state, control, **kwargs: self.seen.append(take(state, **kwargs)))
