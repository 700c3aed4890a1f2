"""Serving: which layers become sparse and why not, what they compute, and the way back."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fake_gpu import (
    BF16,
    PATTERN,
    PRUNED,
    WIDE,
    assert_close,
    assert_same_state,
    conv1d,
    fake_gpu,
    linear,
    sparse,
    tokens,
)
from hf_admm import accelerate_inference, audit_checkpoint, inference, restore_dense, select_targets


@pytest.fixture
def gpu(monkeypatch):
    with fake_gpu(monkeypatch):
        yield


@pytest.fixture(params=WIDE)
def sparse_model(request):
    """A model in bfloat16 whose pruned weights are 2:4, ready to serve."""
    return sparse(request, request.param)


def reason(layer, name="0.weight", **flags):
    model = nn.Sequential(layer).train(layer.training)
    decisions = {d.name: d for d in accelerate_inference(model, **{"dry_run": True, **flags}).layers}
    return decisions[name].reason


def test_pruned_layers_become_sparse_and_compute_the_same(gpu, sparse_model, request):
    dense = copy.deepcopy(sparse_model)
    report = accelerate_inference(sparse_model)
    pruned = {name for name in select_targets(dense, PATTERN).targets}
    assert {layer.name for layer in report.converted} == pruned
    assert len(pruned) == PRUNED[request.node.callspec.params["sparse_model"]]
    for name in pruned:
        weight = sparse_model.get_parameter(name)
        assert isinstance(weight, inference.BACKENDS["cutlass"]) and not weight.requires_grad
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            assert_close(sparse_model(tokens()).logits, dense(tokens()).logits)


def test_torch_compile_takes_the_sparse_layers_whole(gpu):
    model = nn.Sequential(linear(64, 64), nn.GELU(), conv1d())
    expected = model(torch.ones(2, 3, 64, dtype=BF16))
    assert len(accelerate_inference(model).converted) == 2
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_close(compiled(torch.ones(2, 3, 64, dtype=BF16)), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", inference.DTYPES)
def test_inputs_of_any_shape_and_stride(gpu, dtype, bias):
    dense = linear(dtype=dtype, bias=bias)
    layer = nn.Sequential(copy.deepcopy(dense))
    accelerate_inference(layer)
    inputs = torch.randn(6, 5, 64).to(dtype)
    for given in (inputs, inputs[0, 0], inputs[:, 1], inputs[:0], inputs.transpose(0, 1), inputs[::2, :3]):
        assert_close(layer(given), dense(given))


def test_calling_twice_changes_nothing_more(gpu, sparse_model):
    first = accelerate_inference(sparse_model)
    state = {name: id(parameter) for name, parameter in sparse_model.named_parameters()}
    assert accelerate_inference(sparse_model) == first
    assert state == {name: id(parameter) for name, parameter in sparse_model.named_parameters()}


def test_a_dry_run_says_the_same_and_changes_nothing(gpu, sparse_model):
    before = copy.deepcopy(sparse_model)
    rehearsal = accelerate_inference(sparse_model, dry_run=True)
    assert {type(module) for module in sparse_model.modules()} == {type(module) for module in before.modules()}
    assert_same_state(sparse_model.state_dict(), before.state_dict())
    assert rehearsal.layers == accelerate_inference(sparse_model).layers


def test_a_dry_run_on_a_cpu_assumes_a_gpu_with_both_backends(sparse_model):
    report = accelerate_inference(sparse_model, dry_run=True)
    assert {layer.backend for layer in report.converted} == {"cusparselt"}
    assert report.summary().startswith(
        f"{len(report.converted)} of {len(report.layers)} linear layers would be sparse"
    )


def test_the_table_names_every_linear_layer(gpu, request):
    model = sparse(request, "tiny_bert")
    lines = accelerate_inference(model).table().splitlines()
    assert lines[0].split() == ["weight", "shape", "sparse", "or", "why", "not"]
    assert len(lines) == 1 + 14 + 1
    assert lines[5].split() == ["bert.encoder.layer.0.intermediate.dense.weight", "128x64", "sparse", "(cutlass)"]
    assert (
        "dense: not 2:4 (" in lines[13] and "dense: its shape fits no backend (2 outputs by 64 inputs; " in lines[14]
    )
    assert lines[-1] == ("12 of 14 linear layers sparse; left dense: 1 not 2:4, 1 its shape fits no backend")


def test_one_broken_group_keeps_a_layer_dense(gpu):
    layer = linear()
    layer.weight.data[3, 8:11] = 1.0
    assert reason(layer) == "not 2:4 (1 of 512 groups hold more than 2)"


def test_fewer_than_two_in_a_group_are_fine(gpu):
    layer = linear()
    layer.weight.data[:5] = 0
    layer.weight.data[5, 2] = 0
    layer.weight.data[6, :4] = torch.tensor([0, 0, 0, 1e-30])
    model = nn.Sequential(layer)
    expected = layer.weight.detach().clone()
    accelerate_inference(model)
    assert torch.equal(model.state_dict()["0.weight"], expected)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: linear(dtype=torch.float32), "of float32: cast the model to float16 or bfloat16"),
        (lambda: linear().train(), "in training mode: call model.eval()"),
        (lambda: linear().to("meta"), "on meta"),
        (lambda: linear(rows=48, columns=96), "its shape fits no backend (48 outputs by 96 inputs; cutlass takes "),
        (lambda: type("MyLinear", (nn.Linear,), {})(64, 32).to(BF16).eval(), "a MyLinear, which computes in its own"),
    ],
    ids=["float32", "training", "meta", "shape", "subclass"],
)
def test_reasons(gpu, make, expected):
    assert reason(make()).startswith(expected)


def test_other_reasons(gpu):
    layer = linear()
    layer.bias.data = layer.bias.data.float()
    assert reason(layer) == "its bias has another dtype or device"
    layer = linear()
    layer.weight.data[layer.weight != 0] = float("inf")
    assert reason(layer) == "holds NaN or infinity"
    layer = linear()
    layer.forward = layer.forward
    assert reason(layer) == "its forward is wrapped"
    layer = linear()
    layer.weight = nn.Parameter(inference.BACKENDS["cutlass"].from_dense(layer.weight.detach()), requires_grad=False)
    assert reason(layer) == "held as a SparseSemiStructuredTensorCUTLASS"


def test_tied_weights_stay(gpu):
    model = nn.ModuleList([linear(), linear(), linear()])
    model[1].weight = model[0].weight
    reasons = [layer.reason for layer in accelerate_inference(model).layers]
    assert reasons == ["tied to another module", "tied to another module", ""]


def test_shapes_are_those_of_torch(gpu, monkeypatch):
    for name, backend in inference.BACKENDS.items():
        limits = backend._DTYPE_SHAPE_CONSTRAINTS[BF16]
        rows, columns = limits.sparse_min_rows, limits.sparse_min_cols
        monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
        assert reason(linear(rows, columns), backend=name) == ""
        assert "fits no backend" in reason(linear(rows // 2, columns), backend=name)
        assert "fits no backend" in reason(linear(rows, columns // 2), backend=name)


def test_an_old_gpu(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert reason(linear()) == "on a GPU of compute capability 7.5: 8.0 is needed"


def test_the_next_backend_serves_where_the_first_has_no_kernel(gpu, monkeypatch):
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    model = nn.Sequential(linear())
    [layer] = accelerate_inference(model).layers
    assert layer.backend == "cutlass"
    restore_dense(model)
    with pytest.raises(ValueError, match=r"1 refused by the backend\. .*dry_run=True"):
        accelerate_inference(model, backend="cusparselt")


def test_a_kernel_that_changes_a_value_is_not_used(gpu, monkeypatch):
    cutlass = inference.BACKENDS["cutlass"]
    exact = cutlass.from_dense

    def off_by_a_bit(matrix):
        matrix = matrix.clone()
        matrix[matrix.nonzero()[-1].unbind()] *= 1.01
        return exact(matrix)

    first, second = linear(), linear(rows=64)
    monkeypatch.setattr(cutlass, "from_dense", lambda matrix: (exact, off_by_a_bit)[len(matrix) == 64](matrix))
    model = nn.Sequential(second, first)
    refused, converted = accelerate_inference(model).layers
    assert refused.reason == "refused by the backend (cutlass: its kernel does not give back the weight)"
    assert type(model[0]) is nn.Linear and converted.backend == "cutlass"


def test_an_interrupt_leaves_the_model_dense(gpu, monkeypatch, sparse_model):
    before = copy.deepcopy(sparse_model)
    convert, seen = inference._convert, []

    def interrupted(module, backends):
        seen.append(module)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return convert(module, backends)

    monkeypatch.setattr(inference, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        accelerate_inference(sparse_model)
    assert [type(module) for module in sparse_model.modules()] == [type(module) for module in before.modules()]
    assert_same_state(sparse_model.state_dict(), before.state_dict())


def test_on_a_cpu_the_message_says_what_is_needed(sparse_model):
    before = copy.deepcopy(sparse_model)
    with pytest.raises(ValueError, match=r"needs a CUDA GPU of compute capability 8.0 .* is on cpu .*dry_run=True"):
        accelerate_inference(sparse_model)
    assert [type(module) for module in sparse_model.modules()] == [type(module) for module in before.modules()]


def test_a_dense_model_is_refused_with_the_reasons(gpu, tiny_bert):
    with pytest.raises(ValueError, match=r"Nothing of this BertForSequenceClassification .* 13 not 2:4, 1 its shape"):
        accelerate_inference(tiny_bert(**WIDE["tiny_bert"]).to(BF16).eval())


def test_unknown_and_missing_backends(gpu):
    with pytest.raises(ValueError, match="Unknown backend 'cuda': give 'cusparselt' or 'cutlass', or None"):
        accelerate_inference(linear(), backend="cuda")
    with pytest.raises(ValueError, match="comes without cuSPARSELt: give 'cutlass' or None"):
        accelerate_inference(linear(), backend="cusparselt")


def test_casting_a_sparse_model_says_what_to_do(gpu, sparse_model):
    accelerate_inference(sparse_model)
    with pytest.raises(ValueError, match="can't be cast or moved to another GPU.*Load the checkpoint again"):
        sparse_model.float()
    for module in sparse_model.modules():
        if isinstance(module, inference._Sparse):  # as PyTorch leaves it on a CPU
            module.weight = nn.Parameter(module.weight.to_dense(), requires_grad=False)
    assert {parameter.dtype for parameter in sparse_model.float().parameters()} == {torch.float32}


def test_what_is_saved_is_the_plain_checkpoint(gpu, sparse_model, tmp_path):
    before = copy.deepcopy(sparse_model.state_dict())
    accelerate_inference(sparse_model)
    assert_same_state(sparse_model.state_dict(), before)
    sparse_model.save_pretrained(tmp_path)
    loaded = type(sparse_model).from_pretrained(tmp_path, dtype=BF16)
    assert_same_state(loaded.state_dict(), before)
    assert audit_checkpoint(tmp_path, "2:4").ok


@pytest.mark.parametrize("moved", [False, True])
def test_restore_gives_back_the_dense_model(gpu, sparse_model, moved):
    before = copy.deepcopy(sparse_model)
    accelerate_inference(sparse_model)
    try:
        served = copy.deepcopy(sparse_model)
    except NotImplementedError:  # torch 2.6 can't copy a sparse weight
        served = sparse_model
    if moved:  # what PyTorch does to a sparse weight that leaves its GPU
        for module in served.modules():
            if isinstance(module, inference._Sparse):
                module.weight = nn.Parameter(module.weight.to_dense(), requires_grad=False)
        assert_close(served(tokens()).logits, before(tokens()).logits)
        moved_layers = [d for d in accelerate_inference(served, dry_run=True).layers if "moved since" in d.reason]
        assert len(moved_layers) == sum(isinstance(module, inference._Sparse) for module in served.modules())
    restore_dense(served)
    assert repr(served) == repr(before)
    assert_same_state(served.state_dict(), before.state_dict())
    assert all(parameter.requires_grad for parameter in served.parameters())
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(served.modules(), before.modules(), strict=True))


def test_a_wide_matrix_is_asked_for_in_parts(gpu, monkeypatch):
    monkeypatch.setattr(inference, "_PROBES", 48)
    model = nn.Sequential(linear(columns=128))
    expected = copy.deepcopy(model.state_dict())
    accelerate_inference(model)
    assert_same_state(model.state_dict(), expected)


def test_conv1d_is_restored_the_way_it_was_stored(gpu):
    model = nn.Sequential(conv1d())
    expected = copy.deepcopy(model.state_dict())
    [decision] = accelerate_inference(model).layers
    assert decision.shape == (32, 64) and model[0].weight.shape == (32, 64)
    restore_dense(model)
    assert type(model[0]) is Conv1D and model[0].weight.shape == (64, 32)
    assert_same_state(model.state_dict(), expected)
