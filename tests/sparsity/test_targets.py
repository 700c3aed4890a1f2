"""Which weights are pruned, on tiny models of many families, and what is said about the others."""

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from architectures import SMALL
from hf_admm.pruning.state import ADMMState
from hf_admm.sparsity.patterns import parse_pattern
from hf_admm.sparsity.targets import select_targets


PATTERN = parse_pattern("2:4")
BERT_LAYER = [
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
]
BART = {
    "vocab_size": 64,
    "d_model": 16,
    **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")},
}


def build(head, **config):
    """A tiny model of a family, such as `build("BertForMaskedLM", vocab_size=64)`."""
    model_class = getattr(transformers, head)
    torch.manual_seed(0)
    return model_class(model_class.config_class(**config))


def reasons(selection):
    """The names that are left dense, by reason."""
    grouped = {}
    for name, (_, reason) in selection.left_out.items():
        grouped.setdefault(reason, set()).add(name)
    return grouped


def modules(selection):
    return [name.removesuffix(".weight") for name in selection.targets]


# ---- Families ----


def test_bert_prunes_the_linear_layers_of_its_encoder(tiny_bert):
    model = tiny_bert()
    selection = select_targets(model, PATTERN)
    assert modules(selection) == [f"bert.encoder.layer.{layer}.{name}" for layer in (0, 1) for name in BERT_LAYER]
    for name, target in selection.targets.items():
        assert (target.name, target.shape) == (name, tuple(model.get_parameter(name).shape))
        assert not target.transposed
    assert reasons(selection) == {
        "embedding": {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")},
        "head": {"bert.pooler.dense.weight", "classifier.weight"},
    }


def test_gpt2_is_transposed_and_its_head_is_tied(tiny_gpt2):
    model = tiny_gpt2(n_layer=1)
    selection = select_targets(model, PATTERN)
    shapes = {name: target.shape for name, target in selection.targets.items()}
    assert shapes == {  # (in_features, out_features)
        "transformer.h.0.attn.c_attn.weight": (16, 48),
        "transformer.h.0.attn.c_proj.weight": (16, 16),
        "transformer.h.0.mlp.c_fc.weight": (16, 64),
        "transformer.h.0.mlp.c_proj.weight": (64, 16),
    }
    assert all(target.transposed for target in selection.targets.values())
    # lm_head shares the embedding, so it has no row of its own; pruning it would prune the embedding.
    assert reasons(selection) == {
        "tied embedding": {"transformer.wte.weight"},
        "embedding": {"transformer.wpe.weight"},
    }


def test_a_conv1d_is_fitted_along_its_own_input_dimension():
    # As stored it is 6x8: read the wrong way round, 2:4 would fit its 8 columns.
    with pytest.raises(ValueError, match="0: input dimension 6 is not a multiple of 4"):
        select_targets(nn.Sequential(Conv1D(8, 6)), PATTERN)
    assert list(select_targets(nn.Sequential(Conv1D(6, 8)), PATTERN).targets) == ["0.weight"]


# Heads beyond those of tests/architectures.py.
FAMILIES = {
    "BertForMaskedLM": (
        SMALL,
        12,
        "bert.encoder.layer.0.attention.self.query",
        {
            "outside the layers": {"cls.predictions.transform.dense"},
            "tied embedding": {"bert.embeddings.word_embeddings"},
        },
    ),
    "BertForQuestionAnswering": (SMALL, 12, "bert.encoder.layer.1.output.dense", {"head": {"qa_outputs"}}),
    "ModernBertForSequenceClassification": (
        {**SMALL, "cls_token_id": 0, "sep_token_id": 0},
        8,
        "model.layers.0.attn.Wqkv",
        {"head": {"classifier", "head.dense"}},
    ),
    "BartForSequenceClassification": (
        BART,
        16,
        "model.decoder.layers.0.encoder_attn.out_proj",
        {"head": {"classification_head.dense", "classification_head.out_proj"}},
    ),
    "LlamaForSequenceClassification": (SMALL, 14, "model.layers.1.mlp.down_proj", {"head": {"score"}}),
}


@pytest.mark.parametrize("head", FAMILIES)
def test_families(head):
    config, count, one_of_them, dense = FAMILIES[head]
    model = build(head, **config)
    selection = select_targets(model, PATTERN)
    assert len(selection.targets) == count
    assert one_of_them is None or one_of_them in modules(selection)
    for reason, names in dense.items():
        assert {name.removesuffix(".weight") for name in reasons(selection)[reason]} >= names
    # Nothing is silent: every matrix of the model is in the one or in the other.
    matrices = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    assert matrices == {*selection.targets, *selection.left_out}


def test_albert_prunes_the_layer_that_it_runs_many_times_once():
    model = build("AlbertForSequenceClassification", **SMALL, embedding_size=8)
    selection = select_targets(model, PATTERN)
    assert model.config.num_hidden_layers == 2 and len(selection.targets) == 6
    assert all(".albert_layers.0." in name for name in selection.targets)
    # It maps the embedding to the width of the layers.
    assert "albert.encoder.embedding_hidden_mapping_in.weight" in reasons(selection)["outside the layers"]


@pytest.mark.parametrize("head", ["MixtralForCausalLM", "Qwen2MoeForCausalLM"])
def test_a_mixture_of_experts_says_that_routers_and_fused_experts_stay_dense(head):
    experts = {"num_local_experts": 4}
    if head.startswith("Qwen"):
        experts = {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 16}
    model = build(head, **{**SMALL, "num_hidden_layers": 1}, num_key_value_heads=2, **experts)
    selection = select_targets(model, PATTERN)
    dense = reasons(selection)
    assert "model.layers.0.mlp.gate.weight" in dense["router"]
    # Three dimensions, all experts in one: no nn.Linear holds them.
    fused = {f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
    assert dense["fused experts (unsupported)"] == fused
    if head.startswith("Qwen"):
        assert "model.layers.0.mlp.shared_expert_gate.weight" in dense["router"]  # an nn.Linear of its own
        assert "model.layers.0.mlp.shared_expert.gate_proj.weight" in selection.targets
    else:
        assert set(modules(selection)) == {f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"}


def test_a_model_without_a_module_list_counts_as_one_layer():
    model = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 8), nn.Linear(8, 4))
    model.add_module("score", nn.Linear(4, 2))
    selection = select_targets(model, PATTERN)
    assert modules(selection) == ["1", "2"]
    assert reasons(selection) == {"embedding": {"0.weight"}, "head": {"score.weight"}}


def test_selecting_leaves_the_model_as_it_was(tiny_bert):
    model = tiny_bert()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    select_targets(model, PATTERN)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert before.keys() == model.state_dict().keys()


# ---- Tied and frozen weights ----


def test_two_layers_that_share_a_weight_stay_dense(tiny_bert):
    model = tiny_bert()
    first, second = (layer.attention.self for layer in model.bert.encoder.layer)
    second.query.weight = first.query.weight
    selection = select_targets(model, PATTERN)
    assert len(selection.targets) == 10
    assert reasons(selection)["tied to another module"] == {"bert.encoder.layer.0.attention.self.query.weight"}


def test_frozen_parameters_are_not_pruned(tiny_bert):
    model = tiny_bert()
    model.bert.encoder.layer[0].requires_grad_(False)
    selection = select_targets(model, PATTERN)
    assert modules(selection) == [f"bert.encoder.layer.1.{name}" for name in BERT_LAYER]
    assert reasons(selection)["frozen"] == {f"bert.encoder.layer.0.{name}.weight" for name in BERT_LAYER}


# ---- The table ----


def test_the_table_shows_every_matrix_with_its_shape_and_reason(tiny_gpt2):
    model = tiny_gpt2(n_layer=1)
    selection = select_targets(model, PATTERN, exclude=["c_fc"])
    header, *rows, summary = selection.table().splitlines()
    assert header.split(maxsplit=2) == ["weight", "shape", "pruned or why not"]
    assert [row.split(maxsplit=2) for row in rows] == [
        ["transformer.h.0.attn.c_attn.weight", "16x48", "pruned"],
        ["transformer.h.0.attn.c_proj.weight", "16x16", "pruned"],
        ["transformer.h.0.mlp.c_proj.weight", "64x16", "pruned"],
        ["transformer.wte.weight", "64x16", "tied embedding"],
        ["transformer.wpe.weight", "32x16", "embedding"],
        ["transformer.h.0.mlp.c_fc.weight", "16x64", "excluded by sparsity_exclude"],
    ]
    assert len({row.index(row.split(maxsplit=2)[2]) for row in rows}) == 1  # in columns
    assert summary == selection.summary()
    # 2,048 of 2,048 + (64 + 32 + 64) * 16 entries.
    assert summary.startswith("3 weights pruned (2,048 entries, 44.4% of all matrices); left dense: ")
    assert "1 tied embedding, 1 embedding, 1 excluded by sparsity_exclude" in summary


def test_the_summary_of_a_model_that_is_pruned_whole():
    selection = select_targets(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8)), PATTERN)
    assert selection.summary() == "2 weights pruned (64 entries, 100.0% of all matrices); left dense: none"


def test_activation_checkpointing_changes_no_name(tiny_bert):
    """Under FSDP it wraps the layers, and every name below gains a part that no file has."""
    wrapper = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    model, pattern = tiny_bert(), parse_pattern("2:4")
    plain = select_targets(model, pattern)
    for index, layer in enumerate(model.bert.encoder.layer):
        model.bert.encoder.layer[index] = wrapper.checkpoint_wrapper(layer)
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_parameters())
    wrapped = select_targets(model, pattern)
    assert wrapped == plain
    state = ADMMState()
    state.reset(model, pattern, wrapped)
    assert set(state.weights.parameters) == set(plain.targets)
