"""Trainers that are started more than once: by a search, or after an error."""

import optuna

from hf_admm import ADMMTrainer
from tiny_runs import weights


def search(trainer, space, **kwargs):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.GridSampler(space, seed=1)
    return trainer.hyperparameter_search(
        hp_space=lambda trial: {name: trial.suggest_categorical(name, values) for name, values in space.items()},
        n_trials=len(space["sparsity_pattern"]),
        sampler=sampler,
        **kwargs,
    )


class Trials(ADMMTrainer):
    """Notes how each trial ends."""

    def __init__(self, *args, **kwargs):
        self.ends = []
        super().__init__(*args, **kwargs)

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            self.ends.append((self.args.sparsity_pattern, self.audit, self.sparsity.phase.name, weights(self.model)))


class Breaks(ADMMTrainer):
    """Raises once, in the middle of a step, after the forward pass."""

    error, at = None, None

    def compute_loss(self, *args, **kwargs):
        result = super().compute_loss(*args, **kwargs)
        if self.error is not None and self.state.global_step == self.at:
            error, self.error = self.error, None
            raise error
        return result


def out_of_memory():
    return RuntimeError("CUDA out of memory.")
