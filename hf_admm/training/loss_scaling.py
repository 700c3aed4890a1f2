"""Whether a model divides its loss by the number of items that Trainer tells it.

Trainer takes every model whose `forward` accepts `**kwargs` for one that normalises its loss by `num_items_in_batch`,
and then neither divides by the accumulation steps nor lets DDP's mean stand. Many heads, BERT's classifier among them,
accept the argument and return a plain mean: their gradient and their logged loss come out multiplied by the
accumulation steps and by the number of processes, and rho means something else in every set-up.
"""

import inspect

from torch import nn


def returns_plain_mean(model: nn.Module) -> bool:
    """
    Whether the loss of a model is a mean over the batch whatever `num_items_in_batch` it is given.

    Args:
        model (`nn.Module`):
            An unwrapped model.

    Returns:
        `bool`: `False` also if its source can't be read, which leaves Trainer's own judgement.
    """
    try:
        source = inspect.getsource(inspect.unwrap(type(model).forward))
    except (OSError, TypeError):
        return False
    if "num_items_in_batch" in source:
        return False
    if "loss_function(" not in source:
        return "loss" in source
    # ForSequenceClassificationLoss passes the number on for single labels only.
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    regression = problem == "regression" or (problem is None and getattr(config, "num_labels", None) == 1)
    sequence = getattr(model, "loss_type", None) == "ForSequenceClassification"
    return sequence and (regression or problem == "multi_label_classification")
