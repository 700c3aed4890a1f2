"""`nn.MultiheadAttention`: its queries, keys and values are parameters of its own, and pruned by default."""

import pytest
import torch
from torch import nn

from hf_admm import ADMMTrainer, ADMMTrainingArguments, audit_checkpoint
from hf_admm.sparsity.patterns import parse_pattern
from hf_admm.sparsity.projections import broken_groups
from hf_admm.sparsity.targets import select_targets


PATTERN = parse_pattern("2:4")


class Classifier(nn.Module):
    """PyTorch's own encoder, with a task."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 2)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.encoder(self.embed(input_ids)).mean(dim=1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def pruned(model, **names):
    return [name.removeprefix("encoder.layers.0.") for name in select_targets(model, PATTERN, **names).targets]


LAYER = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]


def test_it_is_pruned_by_default():
    assert pruned(Classifier())[:4] == LAYER and len(pruned(Classifier())) == 8
    assert pruned(nn.TransformerEncoderLayer(16, 2, 32)) == LAYER
    assert not any(target.transposed for target in select_targets(Classifier(), PATTERN).targets.values())


def test_queries_keys_and_values_of_other_widths():
    model = nn.Sequential(nn.MultiheadAttention(16, 2, kdim=8, vdim=12), nn.Linear(16, 16))
    names = [f"0.{name}_proj_weight" for name in "qkv"]
    assert pruned(model) == [*names, "0.out_proj.weight", "1.weight"]
    assert pruned(model, include=["k_proj_weight"]) == ["0.k_proj_weight"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["self_attn"], LAYER[:2]),
        (["in_proj_weight"], LAYER[:1]),
        (["out_proj"], LAYER[1:2]),
        (["self_attn.in_proj_weight", "linear1"], [LAYER[0], LAYER[2]]),
        (r".*\.self_attn", LAYER[:2]),
        (r".*in_proj_weight", LAYER[:1]),
    ],
)
def test_it_is_named_whole_or_in_part(names, expected):
    model = Classifier()
    assert pruned(model, include=names)[: len(expected)] == expected
    assert len(pruned(model, include=names)) == 2 * len(expected)
    assert pruned(model, exclude=names)[: 4 - len(expected)] == [name for name in LAYER if name not in expected]


def test_a_pattern_that_does_not_fit_names_it():
    with pytest.raises(ValueError, match=r"--sparsity_exclude .*self_attn\.in_proj_weight") as error:
        select_targets(Classifier(), parse_pattern("16:32"))
    names = str(error.value).partition("--sparsity_exclude ")[2].partition(",")[0].split()
    assert pruned(Classifier(), exclude=names)  # the advice works
    selection = select_targets(Classifier(), parse_pattern("16:32"), exclude=names)
    assert list(selection.targets) == [f"encoder.layers.{index}.linear2.weight" for index in (0, 1)]


def test_parametrized_queries_are_refused_by_name():
    model = Classifier()
    nn.utils.parametrizations.weight_norm(model.encoder.layers[0].self_attn, "in_proj_weight")
    with pytest.raises(ValueError, match=r"self_attn: parametrized.*ations\(module, 'in_proj_weight'\)"):
        select_targets(model, PATTERN, include=["self_attn"])


def test_a_run_ends_sparse_and_resumes_exactly(tmp_path):
    data = [{"input_ids": torch.arange(i, i + 6) % 32, "labels": torch.tensor(i % 2)} for i in range(16)]

    def trainer(folder):
        torch.manual_seed(0)
        args = ADMMTrainingArguments(
            str(folder), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, admm_steps=3,
            admm_update_steps=1, save_steps=2, report_to="none", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        return ADMMTrainer(Classifier(), args, train_dataset=data, eval_dataset=data)

    first = trainer(tmp_path / "a")
    first.train()
    assert first.audit.ok and len(first.audit.sparse) == 8
    weight = first.model.encoder.layers[1].self_attn.in_proj_weight
    assert weight.shape == (48, 16) and not broken_groups(weight.detach(), PATTERN).any()
    report = audit_checkpoint(tmp_path / "a" / "checkpoint-4")
    assert report.ok and "encoder.layers.0.self_attn.in_proj_weight" in [entry.name for entry in report.sparse]
    # In eval mode PyTorch takes a fused path of its own, which reads the same weights.
    batch = torch.stack([row["input_ids"] for row in data])
    labels = torch.stack([row["labels"] for row in data])
    fused = first.model.eval()(batch, labels)["logits"].detach()
    assert torch.allclose(first.model.train()(batch, labels)["logits"], fused, atol=1e-5)

    for step in (2, 4):
        again = trainer(tmp_path / "b")
        again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        for name, value in first.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], value)
