"""What is named in sparsity_include and can't be pruned is refused by name; small selections are warned about."""

import re

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from architectures import SMALL
from hf_admm import ADMMTrainer, ADMMTrainingArguments
from hf_admm.sparsity.patterns import parse_pattern
from hf_admm.sparsity.targets import select_targets


PATTERN = parse_pattern("2:4")
QUERY = "bert.encoder.layer.0.attention.self.query"


def query_of(model):
    return model.get_submodule(QUERY)


PARAMETRIZED = {
    "prune": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "prune.remove(module, 'weight')"),
    "weight_norm": (parametrizations.weight_norm, "parametrize.remove_parametrizations(module, 'weight')"),
    "old weight_norm": (nn.utils.weight_norm, "remove_weight_norm(module, 'weight')"),
    "spectral_norm": (parametrizations.spectral_norm, "parametrize.remove_parametrizations(module, 'weight')"),
    "old spectral_norm": (nn.utils.spectral_norm, "remove_spectral_norm(module, 'weight')"),
    "one's own": (
        lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity()),
        "parametrize.remove_parametrizations(module, 'weight')",
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_a_parametrized_layer(kind, tiny_bert):
    model, (apply, remedy) = tiny_bert(), PARAMETRIZED[kind]
    apply(query_of(model))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    selection = select_targets(model, PATTERN)
    assert len(selection.targets) == 11 and not any(QUERY in name for name in selection.targets)
    left = {reason for name, (_, reason) in selection.left_out.items() if QUERY in name}
    assert left == {"parametrized"}
    # The query of the other layer can be pruned, and this one would silently not be.
    with pytest.raises(ValueError, match=f"names 1 of what can't be pruned:\n  {re.escape(QUERY)}: par") as error:
        select_targets(model, PATTERN, include=["query", "key"])
    assert remedy in str(error.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    # The advice, word by word.
    eval(re.search(r"Fold it: (.*)", str(error.value))[1], {"torch": torch, "module": query_of(model)})
    assert len(select_targets(model, PATTERN, include=["query", "key"]).targets) == 4


def test_leaving_it_dense_is_the_other_way_out(tiny_bert):
    model = tiny_bert()
    prune.l1_unstructured(query_of(model), "weight", 0.5)
    with pytest.raises(ValueError, match="can't be pruned") as error:
        select_targets(model, PATTERN, include=["query"], exclude=["1.attention.self.query", "key"])
    names = re.search(r"--sparsity_exclude (.*)\.$", str(error.value))[1].split()
    assert names == ["1.attention.self.query", "key", QUERY]
    names.remove("1.attention.self.query")
    assert len(select_targets(model, PATTERN, include=["query"], exclude=names).targets) == 1


@pytest.mark.parametrize("include", [["query", "key"], r".*\.(query|key)"])
def test_all_are_named_at_once(include, tiny_bert):
    model = tiny_bert()
    first, second = (layer.attention.self for layer in model.bert.encoder.layer)
    first.query.requires_grad_(False)
    second.key.weight = first.key.weight
    with pytest.raises(ValueError, match="names 3 of what can't be pruned") as error:
        select_targets(model, PATTERN, include=include)
    message = str(error.value)
    assert f"  {QUERY}: frozen. Unfreeze it: requires_grad_(True)" in message
    assert f"{QUERY[:-5].replace('.0.', '.1.')}key: tied to another module (bert.encoder.layer.0" in message


def test_a_tied_head(tiny_gpt2):
    with pytest.raises(ValueError, match=r"lm_head: tied to another module \(transformer.wte.weight\), which"):
        select_targets(tiny_gpt2(n_layer=1), PATTERN, include=["lm_head", "c_fc"])
    selection = select_targets(tiny_gpt2(n_layer=1), PATTERN, include=["lm_head", "c_fc"], exclude=["lm_head"])
    assert list(selection.targets) == ["transformer.h.0.mlp.c_fc.weight"]


def test_embeddings_convolutions_and_experts(tiny_bert):
    with pytest.raises(ValueError, match="word_embeddings.weight: embedding. Only linear layers and nn.Multihead"):
        select_targets(tiny_bert(), PATTERN, include=["query", "word_embeddings"])
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 8), nn.Linear(8, 4))
    with pytest.raises(ValueError, match="0.weight: convolution"):
        select_targets(model, PATTERN, include=["0", "1"])
    experts = {**SMALL, "num_hidden_layers": 1, "num_key_value_heads": 2, "num_local_experts": 4}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**experts))
    for names in (["q_proj", "experts"], ["q_proj", "gate_up_proj"]):
        with pytest.raises(ValueError, match=r"experts\.gate_up_proj: fused experts \(unsupported\)"):
            select_targets(model, PATTERN, include=names)


def test_a_name_that_means_linear_layers_too_is_no_error():
    model = nn.Module()
    model.patch, model.attn = nn.Module(), nn.Module()
    model.patch.proj, model.attn.proj = nn.Conv2d(3, 8, 2), nn.Linear(8, 8)  # as timm names them
    assert list(select_targets(model, PATTERN, include=["proj"]).targets) == ["attn.proj.weight"]


def test_the_name_of_the_parameter_will_do(tiny_bert):
    assert list(select_targets(tiny_bert(), PATTERN, include=[f"{QUERY}.weight"]).targets) == [f"{QUERY}.weight"]


# ---- Next to nothing ----


def test_a_small_selection_is_warned_about(tiny_bert):
    model = nn.Sequential(nn.Conv2d(32, 32, 5), nn.Linear(8, 8), nn.Linear(8, 8))
    selection = select_targets(model, PATTERN)
    # 128 of 25,728 entries.
    assert re.match(r"Only 0\.5% of the entries .*: convolution \(99\.5%\)\..* sparsity_include", selection.warning())
    assert selection.table().endswith(selection.warning())
    assert select_targets(tiny_bert(), PATTERN).warning() is None


def test_nothing_to_prune_says_what_would_help(tiny_bert):
    model = tiny_bert().requires_grad_(False)
    with pytest.raises(ValueError, match=r"Unfreeze weights with model\.requires_grad_\(True\)"):
        select_targets(model, PATTERN)
    model = tiny_bert()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            prune.identity(module, "weight")
    with pytest.raises(ValueError, match=r"14 parametrized.*Remove the parametrizations"):
        select_targets(model, PATTERN)


def test_a_convolutional_network_is_not_advised_to_name_its_convolutions():
    with torch.device("meta"):
        config = transformers.ResNetConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8], embedding_size=8)
        model = transformers.ResNetForImageClassification(config)
    with pytest.raises(ValueError, match="Only linear layers and nn.MultiheadAttention can be") as error:
        select_targets(model, PATTERN)
    assert "sparsity_include can name: classifier.1." in str(error.value)


def test_the_trainer_warns_of_a_small_selection(tiny_bert, tmp_path, caplog):
    args = ADMMTrainingArguments(str(tmp_path), sparsity_include=[QUERY], report_to="none", use_cpu=True)
    ADMMTrainer(tiny_bert(), args)
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert any(re.match(r"Only \d\.\d% of the entries of this model's matrices", text) for text in warnings)
