"""Models of a user's own, by what they do with the number of items that Trainer tells them."""

from torch import nn


class Wrapper(nn.Module):
    """A model of one's own around a transformer, whose source says nothing about the count."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config


class Hands(Wrapper):
    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)


class Divides(Wrapper):
    """Its own sum over a count under another name."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **extra):
        logits = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
        given = [value for name, value in extra.items() if name.startswith("num_items")]
        total = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return total / (given[0] if given else (labels[:, 1:] != -100).sum()), logits


class DividesInTraining(Hands):
    """In evaluation it looks like a plain mean."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        return super().forward(input_ids, attention_mask, labels, **(kwargs if self.training else {}))


class Means(Wrapper):
    """Accepts the count, speaks of num_items_in_batch, and returns a mean."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, num_items_in_batch=None, **kwargs):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


class MeansInTraining(Means):
    """Without a loss in evaluation."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, attention_mask, labels, **kwargs)
        return outputs if self.training else {"logits": outputs.logits}
