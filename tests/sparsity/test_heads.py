"""Heads and layers told apart by what they are: lists of heads, blocks in sequences, models without blocks."""

import pytest
import torch
import transformers
from torch import nn

from architectures import SMALL
from hf_admm.sparsity.patterns import parse_pattern
from hf_admm.sparsity.targets import select_targets


PATTERN = parse_pattern("2:4")


def pruned(model):
    return [name.removesuffix(".weight") for name in select_targets(model, PATTERN).targets]


def dense(model):
    """Reasons by the names of modules."""
    return {
        name.removesuffix(".weight"): reason for name, (_, reason) in select_targets(model, PATTERN).left_out.items()
    }


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.mix, self.out = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)


class Net(nn.Module):
    """A model of two blocks, and of whatever else it is given."""

    def __init__(self, **more):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        for name, module in more.items():
            self.add_module(name, module)


BLOCKS = [f"blocks.{index}.{name}" for index in (0, 1) for name in ("mix", "out")]


def mlp(*widths):
    """As DETR predicts boxes: the layers in a list of their own."""
    module = nn.Module()
    module.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False))
    return module


HEADS = {
    "bare": lambda: nn.ModuleList([nn.Linear(16, 4), nn.Linear(16, 8)]),
    "as wide as the model": lambda: nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)]),
    "boxes": lambda: nn.ModuleList([mlp(16, 16, 16, 4), mlp(16, 16, 16, 4)]),
    "sequences": lambda: nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))]),
    "by task": lambda: nn.ModuleDict({"a": mlp(16, 16, 4), "b": mlp(16, 16, 4)}),
    "one": lambda: nn.Linear(16, 16),
    "steps": lambda: nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(2)], nn.Linear(16, 4)),
    "a list in a list": lambda: nn.ModuleList([nn.ModuleList([nn.Linear(16, 4)]), nn.ModuleList([nn.Linear(16, 8)])]),
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("name", ["task_heads", "outputs"])  # by what it is, whatever its name
def test_heads_beside_blocks_stay_dense(kind, name):
    assert pruned(Net(**{name: HEADS[kind]()})) == BLOCKS


@pytest.mark.parametrize("name", ["lm_heads", "class_embed", "bbox_embed", "heads", "span_predictor"])
def test_a_list_of_heads_that_put_out_the_width_of_the_model_is_told_by_its_name(name):
    model = Net(**{name: nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))])})
    assert pruned(model) == BLOCKS
    assert {reason for module, reason in dense(model).items() if module.startswith(name)} == {"head"}


def test_a_gate_at_the_end_of_a_block_makes_it_no_head():
    blocks = [Block(), Block()]
    for block in blocks:
        block.modulation = nn.Linear(16, 48)
    assert len(pruned(nn.ModuleList(blocks))) == 6


def test_blocks_within_what_is_named_a_head_are_blocks():
    layer = nn.TransformerEncoderLayer(16, 2, 32)
    names = pruned(Net(predictor=nn.TransformerEncoder(layer, 2), head=nn.Linear(16, 4)))
    assert len(names) == 4 + 2 * 4 and "predictor.layers.1.linear2" in names


@pytest.mark.parametrize("depth", [1, 3])
def test_blocks_in_a_sequence(depth):
    """As timm has them."""
    model = nn.Module()
    model.patch = nn.Conv2d(3, 16, 2)
    model.blocks = nn.Sequential(*[Block() for _ in range(depth)])
    model.head = nn.Linear(16, 4)
    assert len(pruned(model)) == 2 * depth
    assert dense(model) == {"patch": "convolution", "head": "head"}


def test_stages_of_blocks_in_sequences():
    """As torchvision's Swin and ConvNeXt have them: stages in a sequence, what changes the width between them."""
    stages = [nn.Sequential(Block(16), Block(16)), nn.Linear(16, 32), nn.Sequential(Block(32), Block(32))]
    model = nn.Sequential(nn.Sequential(*stages), nn.Linear(32, 10))
    assert len(pruned(model)) == 8 and dense(model)["1"] == "outside the layers"


def test_an_mlp_ends_with_a_head():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    assert pruned(model) == ["0", "2"]
    assert dense(model) == {"4": "head"}
    layers = nn.Module()
    layers.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)])
    assert pruned(layers) == ["layers.0", "layers.1"]


def test_two_heads_at_the_end_of_a_model_without_blocks():
    model = nn.Module()
    model.head = nn.Linear(8, 8)  # by its name, wherever it stands
    model.first, model.second = nn.Linear(16, 8), nn.Linear(8, 16)
    model.labels, model.boxes = nn.Linear(16, 3), nn.Linear(16, 4)
    assert pruned(model) == ["first", "second"]


def test_a_single_layer_is_no_head():
    assert pruned(nn.Linear(8, 4)) == ["weight"]


def test_the_last_layer_after_convolutions_is_a_head():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 10))
    with pytest.raises(ValueError, match="1 convolution, 1 head") as error:
        select_targets(model, PATTERN)
    message = str(error.value)
    assert "Only linear layers and nn.MultiheadAttention can be pruned" in message
    assert "sparsity_include can name: 2." in message  # not the convolution
    assert pruned(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 10))) == [
        "1",
        "2",
    ]


# ---- Real models ----


def musicgen():
    config = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32}
    return "MusicgenForCausalLM", transformers.MusicgenDecoderConfig(**config, num_codebooks=2), 10, ["lm_heads"]


def bark():
    config = {"block_size": 16, "input_vocab_size": 64, "output_vocab_size": 64, "num_layers": 1, "num_heads": 2}
    config = transformers.BarkFineConfig(**config, hidden_size=16, n_codes_total=3, n_codes_given=1)
    return "BarkFineModel", config, 4, ["lm_heads"]


def detr():
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.RTDetrConfig(
        backbone_config=backbone, d_model=16, encoder_hidden_dim=16, encoder_in_channels=[8, 16, 16],
        decoder_in_channels=[16, 16, 16], decoder_layers=2, num_queries=5, num_labels=16,
        decoder_attention_heads=2, encoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
    )  # fmt: skip
    return "RTDetrForObjectDetection", config, None, ["class_embed", "bbox_embed", "enc_score", "enc_bbox"]


def switch():
    config = transformers.SwitchTransformersConfig(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
    )  # fmt: skip
    return "SwitchTransformersForConditionalGeneration", config, None, ["router", "lm_head"]


@pytest.mark.parametrize("make", [musicgen, bark, detr, switch])
def test_heads_of_real_models_stay_dense(make):
    head, config, count, words = make()
    with torch.device("meta"):
        model = getattr(transformers, head)(config)
    names = pruned(model)
    assert [name for name in names if any(word in name for word in words)] == []
    assert len(names) == count if count else len(names) > 8


def test_two_models_in_a_list_are_no_blocks():
    config = transformers.BertConfig(**SMALL)
    model = nn.ModuleList([transformers.BertModel(config), transformers.BertModel(config)])
    names = pruned(model)
    assert len(names) == 2 * 2 * 6 and all(".encoder.layer." in name for name in names)


def test_modules_of_sentence_transformers_are_no_blocks():
    dense_layers = [nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)) for _ in range(2)]
    model = nn.Sequential(transformers.BertModel(transformers.BertConfig(**SMALL)), *dense_layers)
    assert len(pruned(model)) == 12
