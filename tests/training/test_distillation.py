"""The distances of a student from its teacher, each against the sum written out by hand."""

import math

import pytest
import torch

from hf_admm.training.distillation import (
    ANY_OF,
    NUMBERS,
    ONE_OF,
    counted_tokens,
    hidden_distance,
    logits_distance,
    logits_kind,
    named_hidden_states,
    named_logits,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def divergence(ours, theirs, temperature):
    """The KL divergence of one row, in Python's own numbers."""

    def softmax(row):
        powers = [math.exp(float(value) / temperature) for value in row]
        return [power / sum(powers) for power in powers]

    p, q = softmax(theirs), softmax(ours)
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_logits_of_classes_by_hand(temperature):
    ours, theirs = random(4, 3), random(4, 3, seed=1)
    expected = sum(divergence(*rows, temperature) for rows in zip(ours, theirs, strict=True)) / 4 * temperature**2
    assert float(logits_distance(ours, theirs, temperature)) == pytest.approx(expected, rel=1e-5)
    assert float(logits_distance(theirs, theirs, temperature)) == pytest.approx(0, abs=1e-6)
    assert float(logits_distance(theirs, ours, temperature)) != pytest.approx(expected, rel=1e-2)  # not symmetric


def test_logits_of_several_labels_by_hand():
    ours, theirs = random(4, 3), random(4, 3, seed=1)
    pairs = zip(ours.flatten(), theirs.flatten(), strict=True)
    expected = sum(divergence([a, 0.0], [b, 0.0], 2.0) for a, b in pairs) / 12 * 4
    assert float(logits_distance(ours, theirs, 2.0, ANY_OF)) == pytest.approx(expected, rel=1e-5)


def test_numbers_by_hand():
    ours, theirs = random(4, 2), random(4, 2, seed=1)
    expected = sum((float(a) - float(b)) ** 2 for a, b in zip(ours.flatten(), theirs.flatten(), strict=True)) / 8
    assert float(logits_distance(ours, theirs, 7.0, NUMBERS)) == pytest.approx(expected, rel=1e-5)


def test_no_token_counts_as_nothing():
    none = torch.zeros(0, 5, requires_grad=True)
    distance = logits_distance(none, torch.zeros(0, 5), 2.0)
    assert distance.item() == 0
    distance.backward()


def test_hidden_states_by_hand():
    """Three layers behind the embeddings, rows of 5, 3 and 1 tokens: padding may hold anything."""
    ours, theirs = ([random(3, 5, 4, seed=seed + layer) for layer in range(4)] for seed in (0, 10))
    lengths, expected = (5, 3, 1), 0.0
    mask = torch.tensor([[int(t < length) for t in range(5)] for length in lengths])
    for layer in range(1, 4):
        for row, length in enumerate(lengths):
            student, teacher = ours[layer][row, :length], theirs[layer][row, :length]
            error = float(((student - teacher) ** 2).mean())
            expected += error / (float((teacher**2).mean()) + 1e-6) / len(lengths)
    assert float(hidden_distance(ours, theirs, mask)) == pytest.approx(expected, rel=1e-5)
    for states in (ours, theirs):
        for layer in states:
            layer[1, 3:] = 1e6
    ours[0].fill_(1e6)
    assert float(hidden_distance(ours, theirs, mask)) == pytest.approx(expected, rel=1e-5)
    assert float(hidden_distance(ours, theirs)) != pytest.approx(expected, rel=1e-2)


def test_the_distance_of_a_row_does_not_depend_on_its_batch():
    ours, theirs = ([random(4, 5, 4, seed=seed + layer) * (1 + layer) for layer in range(3)] for seed in (0, 10))
    apart = [hidden_distance([h[i : i + 1] for h in ours], [h[i : i + 1] for h in theirs]) for i in range(4)]
    torch.testing.assert_close(hidden_distance(ours, theirs), torch.stack(apart).mean())


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 6)])
def test_feature_maps_have_no_padding(shape):
    """A mask of another size, as that of pixels, says nothing of them."""
    ours, theirs = [random(*shape), random(*shape, seed=1)], [random(*shape, seed=2), random(*shape, seed=3)]
    flat = [(h[1].flatten(1)) for h in (ours, theirs)]
    expected = ((flat[0] - flat[1]).square().mean(1) / (flat[1].square().mean(1) + 1e-6)).mean()
    torch.testing.assert_close(hidden_distance(ours, theirs, torch.zeros(2, 7)), expected)


def test_rows_of_several_choices_share_a_mask():
    ours, theirs = ([random(6, 5, 4, seed=seed + layer) for layer in range(2)] for seed in (0, 10))
    mask = (random(2, 3, 5) > -1).long()
    torch.testing.assert_close(
        hidden_distance(ours, theirs, mask), hidden_distance(ours, theirs, mask.reshape(6, 5)), rtol=0, atol=0
    )


def test_halves_are_compared_in_float32():
    ours, theirs = random(2, 3), random(2, 3, seed=1)
    distance = logits_distance(ours.bfloat16(), theirs.bfloat16())
    assert distance.dtype == torch.float32
    big = [torch.full((1, 2, 2), 1e4).half()] * 2
    assert float(hidden_distance(big, [layer / 2 for layer in big])) == pytest.approx(1.0)


# ---- Which tokens, which logits ----


LABELS = torch.tensor([[5, -100, 3, 2], [-100, -100, 1, -100]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])


@pytest.mark.parametrize(
    ("batch", "shifts", "expected"),
    [
        ({"labels": LABELS, "attention_mask": MASK}, False, [[1, 0, 1, 1], [0, 0, 1, 0]]),
        ({"labels": LABELS, "attention_mask": MASK}, True, [[0, 1, 1, 0], [0, 1, 0, 0]]),
        ({"labels": LABELS, "shift_labels": LABELS.flip(1)}, True, [[1, 1, 0, 1], [0, 1, 0, 0]]),
        ({"attention_mask": MASK}, False, [[1, 1, 1, 0], [1, 1, 0, 0]]),
        ({"attention_mask": MASK}, True, [[1, 1, 0, 0], [1, 0, 0, 0]]),
        ({"labels": torch.tensor([1, 0]), "attention_mask": MASK}, False, [[1, 1, 1, 0], [1, 1, 0, 0]]),
    ],
)
def test_the_tokens_that_count(batch, shifts, expected):
    assert counted_tokens(batch, shifts).int().tolist() == expected


def test_where_nothing_tells_the_tokens():
    assert counted_tokens({"labels": torch.tensor([1, 0]), "other": "x"}, False) is None


def test_the_kind_of_logits_and_the_outputs_by_name():
    assert logits_kind(random(2, 1), None) == logits_kind(random(2, 3), "regression") == NUMBERS
    assert logits_kind(random(2, 3), "multi_label_classification") == ANY_OF
    assert logits_kind(random(2, 3), "single_label_classification") == logits_kind(random(2, 4, 3), None) == ONE_OF
    logits, layers = random(2, 3), (random(2, 3, 4),)
    outputs = {"loss": logits, "start_logits": logits, "end_logits": None, "encoder_hidden_states": layers}
    assert named_logits(outputs) == {"start_logits": logits}
    assert named_hidden_states({**outputs, "hidden_states": None}) == {"encoder_hidden_states": layers}
