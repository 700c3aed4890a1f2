"""How far a student is from its teacher: pure functions on the outputs of one forward pass of each.

Every figure is a mean, of rows or of tokens, in float32. Padding takes no part in any.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn


EPSILON = 1e-6
# What the classes of a row of logits are: one of them applies, any number applies, or they are numbers.
ONE_OF, ANY_OF, NUMBERS = "one of", "any of", "numbers"


def logits_distance(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0, kind: str = ONE_OF
) -> torch.Tensor:
    """
    The distance of logits: `T^2 * KL(softmax(teacher / T) || softmax(student / T))`, or the mean squared error of
    numbers.

    Args:
        student (`torch.Tensor`):
            Logits of shape `(..., classes)`.
        teacher (`torch.Tensor`):
            Logits of the same shape.
        temperature (`float`, *optional*, defaults to 1.0):
            T. Its square makes up for the gradient that it takes away.
        kind (`str`, *optional*, defaults to `"one of"`):
            `"one of"`: the classes exclude one another. `"any of"`: each is a yes or no of its own, and the mean of
            their divergences is taken. `"numbers"`: these are the answers of a regression, which know no temperature.

    Returns:
        `torch.Tensor`: The mean over all but the last dimension; 0 for no logits at all.
    """
    student, teacher = student.float(), teacher.float()
    count = max(1, student.numel() // max(1, student.shape[-1]))
    if kind == NUMBERS:
        return (student - teacher).square().mean(-1).sum() / count
    if kind == ANY_OF:  # a sigmoid is the softmax of a logit beside 0
        student, teacher = (torch.stack([logits, torch.zeros_like(logits)], -1) for logits in (student, teacher))
    ours = nn.functional.log_softmax(student / temperature, -1)
    theirs = nn.functional.log_softmax(teacher / temperature, -1)
    divergence = nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    if kind == ANY_OF:
        divergence = divergence.mean(-1)
    return temperature**2 * divergence.sum() / count


def hidden_distance(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], mask: torch.Tensor | None = None
) -> torch.Tensor:
    """
    The distance of hidden states: for each layer `mean((student - teacher)^2) / (mean(teacher^2) + eps)`, and the sum
    of it over the layers. Both means are those over the tokens of one row, so that the distance of a row does not
    depend on the others in its batch; of the rows the mean is taken.

    Args:
        student (`Sequence[torch.Tensor]`):
            The hidden states as a model returns them: first what the embeddings put out, which takes no part, then
            what each layer does. Rows come first, then tokens (or whatever there is of places).
        teacher (`Sequence[torch.Tensor]`):
            The same of the teacher.
        mask (`torch.Tensor`, *optional*):
            1 for tokens, 0 for padding, of shape `(rows, tokens)`. A mask of another size says nothing of these hidden
            states, and is not used.

    Returns:
        `torch.Tensor`: The distance.
    """
    total = torch.zeros((), device=student[0].device)
    for ours, theirs in zip(student[1:], teacher[1:], strict=True):
        theirs = theirs.float()
        error = _mean_of_rows((ours.float() - theirs).square(), mask)
        total = total + (error / (_mean_of_rows(theirs.square(), mask) + EPSILON)).mean()
    return total


def _mean_of_rows(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None or values.ndim < 3 or mask.numel() != values.shape[0] * values.shape[1]:
        return values.flatten(1).mean(-1)
    mask = mask.reshape(values.shape[:2]).to(
        values.device, values.dtype
    )  # several choices a row are rows of their own
    return (values.flatten(2).mean(-1) * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def counted_tokens(batch: Mapping, shifts: bool) -> torch.Tensor | None:
    """
    The tokens of a batch whose logits count: those with a label, or without labels those that are no padding.

    Args:
        batch (`Mapping`):
            What the collator put together.
        shifts (`bool`):
            Whether the logits at a token are those of the next one, as in a causal language model.

    Returns:
        `torch.Tensor`: Of shape `(rows, tokens)`, or `None` if nothing in the batch tells.
    """
    if isinstance(batch.get("shift_labels"), torch.Tensor):
        return batch["shift_labels"] != -100
    for name, nothing in (("labels", -100), ("attention_mask", 0)):
        marks = batch.get(name)
        if isinstance(marks, torch.Tensor) and marks.ndim == 2:
            counts = marks != nothing
            return nn.functional.pad(counts[:, 1:], (0, 1)) if shifts else counts
    return None


def logits_kind(logits: torch.Tensor, problem_type: str | None) -> str:
    """
    What the classes of logits are.

    Args:
        logits (`torch.Tensor`):
            The logits of a model.
        problem_type (`str`, *optional*):
            What its config says.

    Returns:
        `str`: `"one of"`, `"any of"` or `"numbers"`.
    """
    if logits.shape[-1] == 1 or (logits.ndim == 2 and problem_type == "regression"):
        return NUMBERS
    return ANY_OF if logits.ndim == 2 and problem_type == "multi_label_classification" else ONE_OF


def named_logits(outputs: Mapping) -> dict[str, torch.Tensor]:
    """The logits among the outputs of a model: `logits`, or those of a start and an end."""
    return {
        name: value
        for name, value in outputs.items()
        if (name == "logits" or name.endswith("_logits")) and isinstance(value, torch.Tensor)
    }


def named_hidden_states(outputs: Mapping) -> dict[str, tuple[torch.Tensor, ...]]:
    """The hidden states among the outputs of a model: those of an encoder and of a decoder, or of the one it has."""
    names = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
    return {name: outputs[name] for name in names if isinstance(outputs.get(name), tuple | list)}
