"""A model is pruned in one shot: to the pattern exactly, block after block, and all of it or nothing."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification, BertModel

from hf_admm import (
    ADMMTrainer,
    ADMMTrainingArguments,
    audit_checkpoint,
    parse_pattern,
    prune_one_shot,
    select_targets,
    sparsity_mask,
)
from hf_admm.audit import audit_weights
from hf_admm.one_shot import OneShotReport
from hf_admm.pruning.calibration import InputMoments, evenly, find_blocks, prune_in_blocks
from hf_admm.pruning.layerwise import prune_layer
from hf_admm.pruning.weights import PrunedWeights
from layer_inputs import data, moments_of


def batches_of(rows, size=4):
    """Of a tiny model's examples, without their labels."""
    inputs = torch.stack([row["input_ids"] for row in rows])
    return [{"input_ids": part} for part in inputs.split(size)]


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.head = nn.Linear(16, 2)

    def forward(self, inputs):
        for layer in self.layers:
            inputs = torch.relu(layer(inputs))
        return self.head(inputs)


def test_places_lie_evenly():
    assert evenly(4, 10) == [0, 2, 5, 7] and evenly(99, 3) == [0, 1, 2] and evenly(2, 0) == []


def test_moments_are_the_same_in_parts():
    inputs = data(8)
    assert torch.allclose(moments_of(inputs), inputs.T @ inputs / len(inputs), rtol=1e-4)


def test_padding_does_not_count():
    inputs, tokens = data(8, rows=12).view(3, 4, 8), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    moments = InputMoments(8)
    moments.add(inputs, tokens)
    assert moments.rows == 6
    torch.testing.assert_close(moments.matrix, moments_of(torch.cat([inputs[0, :2], inputs[1]])))
    moments.add(inputs[:, :0], tokens)  # of another shape, and empty
    moments.add(inputs[:, 0], tokens)
    assert moments.rows == 9


class Padded(Blocks):
    """Called as models with tokens are."""

    def forward(self, inputs, attention_mask=None):
        return super().forward(inputs)


@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_a_model_is_pruned_as_without_its_padding(encoder_decoder):
    """But for encoder-decoder models, whose decoder's positions the mask says nothing of."""
    inputs, tokens, found = data(16, rows=60).view(15, 4, 16), torch.tensor([1, 1, 1, 0]).expand(15, 4), []
    for batch in ({"inputs": inputs, "attention_mask": tokens}, {"inputs": inputs[:, :3]}):
        torch.manual_seed(0)
        model = Padded()
        model.config = SimpleNamespace(is_encoder_decoder=encoder_decoder)
        prune_one_shot(model, [batch])
        found.append(model.layers[0].weight.detach())
    assert torch.equal(*found) is not encoder_decoder


class Wrapped(nn.Module):
    """A model within another, whose batches call the mask by another name."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, tokens, padding):
        return self.inner(input_ids=tokens, attention_mask=padding)


def test_padding_is_seen_where_the_model_is_within_another(tiny_bert, token_data):
    tokens, found = torch.stack([row["input_ids"] for row in token_data(24)]), []
    padding = torch.ones_like(tokens)
    padding[:, -3:] = 0
    for junk in (3, 7):
        tokens[:, -3:] = junk
        model = Wrapped(tiny_bert())
        prune_one_shot(model, [{"tokens": tokens, "padding": padding}])
        found.append({name: weight.detach() for name, weight in model.named_parameters()})
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(("enough", "taken"), [(1, [0, 5]), (3, [0, 2, 4, 6, 8]), (6, range(10)), (7, range(10))])
def test_no_more_batches_are_taken_than_are_enough(enough, taken):
    """Of ten batches with ten inputs that count, for layers of 16: they lie evenly, and all are run through once."""
    inputs, tokens = data(16, rows=200).view(10, 1, 20, 16), torch.tensor([[1] * 10 + [0] * 10])
    passes, found = [], []
    for places in (range(10), taken):
        torch.manual_seed(0)
        model, pattern = Padded(), parse_pattern("2:4")
        model.config = SimpleNamespace(is_encoder_decoder=False)
        model.register_forward_pre_hook(lambda *_: passes.append(1))
        batches = [{"inputs": inputs[place], "attention_mask": tokens} for place in places]
        prune = partial(prune_layer, pattern=pattern)
        weights = PrunedWeights(model, pattern, select_targets(model, pattern).targets)
        prune_in_blocks(weights, batches, prune, enough=enough if len(found) == 0 else None)
        found.append([layer.weight.detach() for layer in model.layers])
    assert len(passes) == 10 + 2 * len(taken) + 3 * len(taken)
    for ours, expected in zip(*found, strict=True):
        assert torch.equal(ours, expected)


def test_a_later_block_sees_the_pruned_blocks_before_it():
    torch.manual_seed(0)
    model, inputs, pattern = Blocks(), data(16), parse_pattern("2:4")
    first, second = (layer.weight.detach().clone() for layer in model.layers)
    report = prune_one_shot(model, [{"inputs": part} for part in inputs.split(50)], "2:4")
    assert list(report.errors) == ["layers.0.weight", "layers.1.weight"] and model.training
    pruned = prune_layer(first, moments_of(inputs), pattern)
    torch.testing.assert_close(model.layers[0].weight.detach(), pruned, rtol=1e-3, atol=1e-4)
    between = torch.relu(inputs @ pruned.T + model.layers[0].bias.detach())
    expected = prune_layer(second, moments_of(between), pattern)
    torch.testing.assert_close(model.layers[1].weight.detach(), expected, rtol=1e-3, atol=1e-3)
    change = (between @ (second - expected).T).norm() / (between @ second.T).norm()
    assert report.errors["layers.1.weight"] == pytest.approx(change.item(), rel=0.01)
    assert report.table().splitlines()[-1] == "2 weights pruned to 2:4."


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4x4:8", "0.5"])
@pytest.mark.parametrize("name", ["tiny_bert", "tiny_gpt2"])
def test_models_obey_the_pattern_and_answer_better_than_by_magnitude(name, pattern, request, token_data):
    """GPT-2's Conv1D is stored the other way round."""
    build, rows = request.getfixturevalue(name), batches_of(token_data(64))
    model, magnitude, dense = build().eval(), build().eval(), build().eval()
    report = prune_one_shot(model, rows, pattern)
    transposed = name == "tiny_gpt2"
    assert len(report.errors) >= 8
    assert audit_weights([(n, model.get_parameter(n), transposed) for n in report.errors], pattern).ok
    with torch.no_grad():
        for n in report.errors:
            weight = magnitude.get_parameter(n)
            weight.mul_(sparsity_mask(weight, parse_pattern(pattern), transposed))
        changes = [
            sum((other(**batch).logits - dense(**batch).logits).square().sum().item() for batch in rows)
            for other in (model, magnitude)
        ]
    assert changes[0] < changes[1]


def test_bfloat16_stays_and_the_random_state_too(tiny_bert, token_data):
    model, before = tiny_bert().to(torch.bfloat16), torch.get_rng_state()
    report = prune_one_shot(model, batches_of(token_data(16)), "2:4")
    assert torch.equal(torch.get_rng_state(), before)
    weights = [(name, model.get_parameter(name), False) for name in report.errors]
    assert {weight.dtype for _, weight, _ in weights} == {torch.bfloat16} and audit_weights(weights, "2:4").ok


def test_it_is_fine_tuned_under_its_mask(tiny_bert, token_data, tmp_path):
    """As the docstring says: what is zero stays zero, to the plain checkpoint."""
    model, rows = tiny_bert(), token_data(32)
    report = prune_one_shot(model, batches_of(rows), "1:4")
    zeros = {name: model.get_parameter(name) == 0 for name in report.errors}
    args = ADMMTrainingArguments(
        str(tmp_path), sparsity_pattern="1:4", admm_steps=0, srste_mask="fixed", srste_lr_multiplier=1.0, max_steps=6,
        learning_rate=0.01, use_cpu=True, report_to="none", save_strategy="no",
    )  # fmt: skip
    trainer = ADMMTrainer(model, args, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    assert audit_checkpoint(tmp_path / "model", "1:4").ok
    saved = BertForSequenceClassification.from_pretrained(tmp_path / "model")
    assert all(not saved.get_parameter(name)[mask].any() for name, mask in zeros.items())
    start = tiny_bert()
    assert all(not torch.equal(saved.get_parameter(name), start.get_parameter(name)) for name in zeros)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.MultiheadAttention(16, 2, batch_first=True)])
        self.linear = nn.ModuleList([nn.Linear(16, 16)])

    def forward(self, inputs):
        return self.linear[0](self.layers[0](inputs, inputs, inputs)[0])


def test_what_no_batch_reaches_is_refused_before_anything_changes():
    model, batch = Attention(), [{"inputs": data(16, rows=12).view(3, 4, 16)}]
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with pytest.raises(ValueError, match=r"layers\.0\.in_proj_weight, layers\.0\.out_proj\.weight.*sparsity_exclude"):
        prune_one_shot(model, batch)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert list(prune_one_shot(model, batch, sparsity_exclude="layers.*").errors) == ["linear.0.weight"]


def test_a_failure_half_way_leaves_the_model_as_it_was():
    model = Blocks()
    with torch.no_grad():
        model.layers[0].bias[3] = float("inf")
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with pytest.raises(ValueError, match=r"inputs of layers\.1\.weight are not finite"):
        prune_one_shot(model, [{"inputs": data(16)}])
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert [module.training for module in model.modules()] == modes
    assert not any(layer._forward_pre_hooks for layer in model.layers)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_weight_is_refused(value):
    model = Blocks()
    with torch.no_grad():
        model.layers[1].weight[3, 2] = value
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with pytest.raises(ValueError, match=r"The entries of layers\.1\.weight are not finite"):
        prune_one_shot(model, [{"inputs": data(16)}])
    for name, weight in model.named_parameters():
        assert torch.equal(weight.nan_to_num(), before[name].nan_to_num()), name


def test_no_zero_has_a_sign():
    model = Blocks()
    with torch.no_grad():
        model.layers[1].weight.copy_(-model.layers[1].weight.abs())
    inputs = data(16)
    prune_one_shot(model, [{"inputs": inputs}], "1:4")
    for layer in model.layers:
        zeros = layer.weight[layer.weight == 0]
        assert len(zeros) >= layer.weight.numel() * 3 / 4 and not zeros.signbit().any()


class Masked(nn.Linear):
    def forward(self, input, mask=None, scale=1.0):
        return super().forward(input * scale if mask is None else input * scale * mask)


def test_the_inputs_of_a_layer_are_told_by_their_name(tiny_bert):
    """Not by which is given first."""
    pruned, inputs = [], data(16)
    for call in (
        lambda layer, x: layer(mask=torch.ones_like(x), input=x),
        lambda layer, x: layer(x, torch.ones_like(x)),
        lambda layer, x: layer(scale=1.0, input=x),
    ):
        torch.manual_seed(0)
        model = Blocks()
        model.layers[0] = Masked(16, 16)
        model.forward = lambda inputs, model=model, call=call: model.layers[1](call(model.layers[0], inputs))
        prune_one_shot(model, [{"inputs": inputs}])
        pruned.append(model.layers[0].weight)
    assert torch.equal(pruned[0], pruned[1]) and torch.equal(pruned[0], pruned[2])
    model.forward = lambda inputs: model.layers[0](inputs[:, :1], scale=torch.ones(16))
    model.layers[0].forward = lambda first, scale: scale
    with pytest.raises(ValueError, match=r"layers\.1\.weight"):
        prune_one_shot(model, [{"inputs": inputs}])


def test_user_errors():
    with pytest.raises(ValueError, match="A batch is a tuple: give each as a dict"):
        prune_one_shot(Blocks(), [(data(16),)])
    with pytest.raises(ValueError, match='"own" keeps zeros and makes none'):
        prune_one_shot(Blocks(), [{}], "own")
    with pytest.raises(ValueError, match="There is no batch"):
        prune_one_shot(Blocks(), [])
    assert OneShotReport(parse_pattern("2:4"), {"w": 0.25}).table().splitlines()[1].split() == ["w", "25.0%"]


def test_a_model_within_another_is_pruned_in_the_blocks_that_it_has_alone(tiny_bert, token_data):
    """To the same bits: the place in a sequence, as of Sentence Transformers, is no block."""
    alone, batches = tiny_bert(model_class=BertModel), batches_of(token_data(24))

    class First(nn.Sequential):
        def forward(self, input_ids):
            return self[1](self[0](input_ids).last_hidden_state)

    within = First(tiny_bert(model_class=BertModel), nn.Linear(16, 2))
    prune_one_shot(alone, batches, "2:4")
    prune_one_shot(within, batches, "2:4")
    for name, weight in alone.named_parameters():
        assert torch.equal(within[0].get_parameter(name), weight), name


def test_blocks_are_found_in_stages_and_around_parts_and_experts(tiny_bert):
    model = nn.ModuleDict({"wav2vec2": nn.ModuleDict({"stages": nn.ModuleList()})})

    def block():
        parts = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.GELU()), nn.ModuleDict({"fc": nn.Linear(4, 4)})])
        experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(2))
        # As MobileBERT's, which stand between its attention and its output.
        ffn = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(2))
        return nn.ModuleDict({"parts": parts, "experts": experts, "ffn": ffn})

    for _ in range(2):
        stage = nn.ModuleDict({"blocks": nn.ModuleList(block() for _ in range(2)), "down": nn.Linear(4, 4)})
        model["wav2vec2"]["stages"].append(stage)
    model["mixed"] = nn.ModuleList([block(), nn.ModuleDict({"attention": nn.Linear(4, 4)})])
    blocks = find_blocks(model, [name for name, _ in model.named_parameters() if name.endswith("weight")])
    stages = [f"wav2vec2.stages.{stage}" for stage in range(2)]
    expected = [name for at in stages for name in (*(f"{at}.blocks.{place}" for place in range(2)), at)]
    assert list(dict.fromkeys(blocks.values()))[: len(expected)] == expected
    assert blocks["mixed.0.experts.1.up.weight"] == blocks["mixed.0.parts.1.fc.weight"] == "mixed.0"
    assert blocks["mixed.1.attention.weight"] == "mixed.1"
    pooler = "bert.pooler.dense.weight"
    assert find_blocks(tiny_bert(), [pooler]) == {pooler: pooler}


def test_an_expert_that_loses_its_rows_is_masked_by_size():
    """Once the layers before it are pruned; what all batches leave empty is refused."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

        def forward(self, inputs):
            return self.experts[0](inputs) + self.experts[1](inputs[:0]).sum()

    torch.manual_seed(0)
    model = Experts()
    expected = model.experts[1].weight * sparsity_mask(model.experts[1].weight, parse_pattern("2:4"))
    errors = prune_one_shot(model, [{"inputs": data(16)}]).errors
    assert torch.equal(model.experts[1].weight, expected) and errors["experts.1.weight"] == 0
    with pytest.raises(ValueError, match="Nothing but padding reaches the layers"):
        prune_one_shot(Experts(), [{"inputs": data(16)[:0]}])
