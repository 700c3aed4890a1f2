"""Models that cannot be pruned: quantized ones, and adapters over a frozen base."""

import re

import pytest
import torch
from torch import nn

from hf_admm.sparsity.patterns import parse_pattern
from hf_admm.sparsity.targets import matches, select_targets


PATTERN = parse_pattern("2:4")


def test_integer_weights_are_refused(tiny_bert):
    model = tiny_bert()
    query = model.bert.encoder.layer[0].attention.self.query
    query.weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"is quantized \(such as bert.*0\.attention\.self\.query: torch\.int8\)"):
        select_targets(model, PATTERN)


def test_weights_of_8_bits_are_refused(tiny_bert):
    model = tiny_bert().to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"is quantized .*float8_e4m3fn\).*at least 16 bits"):
        select_targets(model, PATTERN)


@pytest.mark.parametrize("attributes", [{"is_quantized": True}, {"quantization_method": "gptq"}])
def test_what_transformers_marks_as_quantized_is_refused(attributes, tiny_bert):
    # GPTQ, AWQ and others replace nn.Linear by layers of their own: the mark is all there is to see.
    model = tiny_bert()
    for name, value in attributes.items():
        setattr(model, name, value)
    with pytest.raises(ValueError, match="is quantized, and pruning needs .* without a quantization_config"):
        select_targets(model, PATTERN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_not_quantized(dtype, tiny_bert):
    assert len(select_targets(tiny_bert().to(dtype), PATTERN).targets) == 12


class LoraLinear(nn.Module):
    """A linear layer with an adapter, named as PEFT names it: the base frozen, A and B trained."""

    def __init__(self, base_layer, rank=4):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base_layer.out_features, bias=False)})


class TrainedCopy(nn.Module):
    """A module that PEFT trains whole (`modules_to_save`): the original frozen, a copy of it trained."""

    def __init__(self, module):
        super().__init__()
        self.original_module = module.requires_grad_(False)
        self.modules_to_save = nn.ModuleDict({"default": nn.Linear(module.in_features, module.out_features)})


class PeftModel(nn.Module):
    """The outside of `peft.PeftModel`."""

    def __init__(self, model, adapted, trained=("classifier",)):
        super().__init__()
        model.requires_grad_(False)
        for name, module in list(model.named_modules()):
            if wrapper := LoraLinear if matches(name, adapted) else TrainedCopy if matches(name, trained) else None:
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, wrapper(module))
        self.base_model = nn.Module()
        self.base_model.model = model
        self.peft_config = {"default": object()}


@pytest.mark.parametrize("include", [None, [f"{name}.base_layer" for name in ("query", "value")]])
def test_lora_is_refused_with_the_way_out(include, tiny_bert):
    model = PeftModel(tiny_bert(), ["query", "value"])
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.dim() == 2]
    assert len(names) == 2 * 2 * 2 + 1  # the wrapper does what it should: A and B of four layers, and the classifier
    with pytest.raises(ValueError, match=r"weights of a PEFT/LoRA model are frozen \(14 layers.*merge_and_unload"):
        select_targets(model, PATTERN, include=include)


def test_an_adapter_within_a_part_of_the_model_is_seen(tiny_bert):
    # As Sentence Transformers holds it: the outer module has no mark.
    model = nn.Sequential(PeftModel(tiny_bert(), ["query"]), nn.Linear(16, 16))
    with pytest.raises(ValueError, match="base weights of a PEFT/LoRA model are frozen"):
        select_targets(model, PATTERN)


def lora(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "value"], r=4))


def test_the_advice_word_by_word(tiny_bert):
    model = lora(tiny_bert())
    with pytest.raises(ValueError, match="PEFT/LoRA") as error:
        select_targets(model, PATTERN)
    scope = {"model": model}
    for line in re.findall(r"`(model.*?)`", str(error.value)):
        exec(line, scope)
    assert len(select_targets(scope["model"], PATTERN).targets) == 12


def test_who_forgets_to_unfreeze_is_told_again(tiny_bert):
    model = lora(tiny_bert()).merge_and_unload()
    with pytest.raises(ValueError, match=r"model\.requires_grad_\(True\)"):
        select_targets(model, PATTERN)


def test_adapters_in_the_model_itself_and_the_way_out(tiny_bert, tmp_path):
    """As `add_adapter` and Sentence Transformers leave it: save the adapter, load it by peft, merge, unfreeze."""
    peft = pytest.importorskip("peft")
    model = tiny_bert()
    model.add_adapter(peft.LoraConfig(target_modules=["query", "value"], r=4))
    outer = nn.Sequential(model, nn.Linear(16, 16))
    for refused in (model, outer):
        with pytest.raises(ValueError, match=r"save them and load them with `peft\.PeftModel\.from_pretrained"):
            select_targets(refused, PATTERN)
    model.save_pretrained(tmp_path)
    merged = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path).merge_and_unload().requires_grad_(True)
    assert len(select_targets(merged, PATTERN).targets) == 12


def test_lora_is_refused_even_if_some_layers_are_trained_whole(tiny_bert):
    # They could be pruned, but what is saved is an adapter that no plain from_pretrained loads.
    model = PeftModel(tiny_bert(), ["query"], trained=["intermediate.dense", "classifier"])
    with pytest.raises(ValueError, match="base weights of a PEFT/LoRA model are frozen"):
        select_targets(model, PATTERN)


def test_adapters_loaded_by_transformers_itself_are_refused(tiny_bert):
    model = PeftModel(tiny_bert(), ["query"]).base_model.model
    model._hf_peft_config_loaded = True  # as `model.add_adapter(...)` leaves it
    with pytest.raises(ValueError, match="base weights of a PEFT/LoRA model are frozen"):
        select_targets(model, PATTERN)


def test_adapters_over_a_trained_base_are_refused(tiny_bert):
    # Their checkpoints hold the adapter alone: the sparse weights would be lost.
    model = PeftModel(tiny_bert(), ["query"], trained=()).requires_grad_(True)
    with pytest.raises(ValueError, match=r"\(PeftModel\) are trained, but its checkpoints hold the adapters alone"):
        select_targets(model, PATTERN)


def test_adapters_of_ones_own_stay_dense(tiny_bert):
    model = PeftModel(tiny_bert(num_hidden_layers=1), ["query"], trained=()).base_model.model.requires_grad_(True)
    selection = select_targets(model, PATTERN)
    query = "bert.encoder.layer.0.attention.self.query"
    assert f"{query}.base_layer.weight" in selection.targets
    adapters = {name for name, (_, reason) in selection.left_out.items() if reason == "adapter"}
    assert adapters == {f"{query}.lora_{side}.default.weight" for side in "AB"}
