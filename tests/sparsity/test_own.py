"""Which weights bring a mask of their own, and what is said of the others."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers import Conv1D

from hf_admm import ADMMTrainingArguments, parse_pattern, project, sparsity_mask
from hf_admm.sparsity.own import is_sparse, select_own
from hf_admm.sparsity.patterns import OwnPattern
from hf_admm.sparsity.projections import broken_groups
from hf_admm.sparsity.targets import select_targets
from own_masks import bring_zeros


def test_the_pattern_is_what_is_not_zero():
    assert parse_pattern(" Own ") == OwnPattern() and str(OwnPattern()) == "own"
    weight = torch.tensor([[[0.0, -0.0, 1.0], [float("nan"), -2.0, 1e-38]]])
    assert sparsity_mask(weight, OwnPattern()).tolist() == [[[False, False, True], [True, True, True]]]
    assert torch.equal(project(weight, OwnPattern()).nan_to_num(), weight.nan_to_num())
    with pytest.raises(ValueError, match="Pattern own has no groups"):
        broken_groups(weight[0], OwnPattern())


@pytest.mark.parametrize(("zeros", "sparse"), [(0, False), (9, False), (10, True), (999, True), (1000, False)])
def test_sparse_is_from_one_percent_on_and_not_all_of_it(zeros, sparse):
    assert is_sparse(zeros, 1000) is sparse


def test_each_weight_is_told_by_its_zeros(tiny_bert):
    model = bring_zeros(tiny_bert())
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.normal_()  # dense again
        model.bert.encoder.layer[1].output.dense.weight.zero_()
        model.bert.pooler.dense.weight[::2] = 0  # a head, and sparse in rows
    selection = select_targets(model, OwnPattern())
    assert len(selection.targets) == 11 and "bert.pooler.dense.weight" in selection.targets
    reasons = {name: reason for name, (_, reason) in selection.left_out.items()}
    assert reasons["bert.encoder.layer.0.output.dense.weight"] == reasons["classifier.weight"] == "dense"
    assert reasons["bert.encoder.layer.1.output.dense.weight"] == "all zero"
    assert selection.warning() is None  # the embedding's row of zeros is padding
    line = selection.summary()
    assert line.startswith("keep their zeros: 11 sparse weights (") and "bert.pooler.dense (50.0% zeros)" in line
    assert "2 of bert.encoder.layer.*.attention.self.query (" in line
    assert "50.00%  sparse, keeps its zeros" in selection.table()


def test_include_and_exclude(tiny_bert):
    model = bring_zeros(tiny_bert())
    assert len(select_own(model, include=["query", "value"]).targets) == 4
    assert len(select_own(model, exclude=["query"]).targets) == 10
    with torch.no_grad():
        model.classifier.weight[0, 0] = 0
        model.classifier.weight[1, 1] = 1
    wide = bring_zeros(tiny_bert(hidden_size=256, num_hidden_layers=1))
    with torch.no_grad():
        wide.classifier.weight[0, 0] = 0  # 1 of 512
    assert "classifier.weight" not in select_own(wide).targets
    assert "classifier.weight" in select_own(wide, include=["classifier", "query"]).targets
    with pytest.raises(ValueError, match="sparsity_include matches no layer with: nowhere"):
        select_own(model, include=["nowhere"])
    with pytest.raises(ValueError, match="word_embeddings.*embedding"):
        select_own(model, include=["word_embeddings"])


class Others(nn.Module):
    """What no pattern of groups is for."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(4, 4, 3)
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.randn(4, 8, 6))
        self.transposed = Conv1D(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.table = nn.Embedding(10, 8)
        self.other = nn.Bilinear(4, 4, 4)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    parameter.view(-1)[::3] = 0


def test_every_kind_of_matrix_that_may_have_a_mask():
    selection = select_targets(Others(), OwnPattern())
    assert {name: tuple(target.shape) for name, target in selection.targets.items()} == {
        "convolution.weight": (4, 4, 3, 3),
        "experts.gate_up_proj": (4, 8, 6),
        "transposed.weight": (8, 8),
        "attention.in_proj_weight": (24, 8),
        "attention.out_proj.weight": (8, 8),
        "first.weight": (8, 8),
    }
    assert selection.targets["transposed.weight"].transposed
    # Nothing is silent: what can't have a mask and has zeros is named.
    assert (
        "zeros of 2 weights are not kept: table.weight (embedding, 33.8% zeros), other.weight" in selection.warning()
    )


def test_what_is_frozen_needs_no_mask(tiny_bert):
    model = bring_zeros(tiny_bert())
    model.bert.encoder.layer[0].requires_grad_(False)
    selection = select_own(model)
    assert len(selection.targets) == len(selection.frozen) == 6
    assert "stay as they are: 6 sparse weights that are frozen: " in selection.summary()
    model.bert.requires_grad_(False)
    selection = select_own(model)
    assert not selection.targets and len(selection.frozen) == 12
    assert selection.summary().startswith("stay as they are: 12 sparse weights")


def test_a_dense_model_is_an_error_that_says_what_to_do(tiny_bert):
    with pytest.raises(ValueError, match="No weight of BertForSequenceClassification is sparse.*14 dense.*'2:4'"):
        select_own(tiny_bert())
    model = tiny_bert()
    prune.l1_unstructured(model.bert.encoder.layer[0].output.dense, "weight", 0.5)
    with pytest.raises(ValueError, match=r"fold masks.*torch\.nn\.utils\.prune\.remove\(module, 'weight'\)"):
        select_own(model)
    with torch.device("meta"), pytest.raises(ValueError, match="on the meta device.*cpu_ram_efficient_loading"):
        select_own(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))


# ---- Flags ----


def test_a_run_has_no_phases(tmp_path):
    args = ADMMTrainingArguments(str(tmp_path), sparsity_pattern="own", use_cpu=True, srste_mask="fixed", admm_steps=0)
    assert args.is_sparse and args.is_own and args.lr_multiplier == 1.0
    plan = args.phase_plan(100)
    assert (plan.admm_steps, plan.freeze_step, plan.segments) == (0, 0, [100])


def test_flags_of_the_phases_are_refused_together(tmp_path):
    with pytest.raises(ValueError, match=r"admm_steps=0.3, admm_rho=0.1, mask_update_steps=4 would have no effect"):
        ADMMTrainingArguments(
            str(tmp_path), sparsity_pattern="own", use_cpu=True, admm_steps=0.3, admm_rho=0.1, mask_update_steps=4
        )
    with pytest.raises(ValueError, match=r"srste_decay=0.0, srste_lr_multiplier=2.0"):
        args = ADMMTrainingArguments(str(tmp_path), use_cpu=True, srste_decay=0.0, srste_lr_multiplier=2.0)
        args.sparsity_pattern = "own"  # as a search of hyperparameters does
        args.validate_sparsity()
