"""The audit of ONNX files: the direction of every kind of product, quantized weights, names, records, other files."""

import sys

import numpy as np
import pytest
import torch

from hf_admm.audit import audit_checkpoint
from hf_admm.checkpoints.onnx_files import RECORD_KEY
from hf_admm.checkpoints.records import record_text
from hf_admm.commands import verify
from hf_admm.sparsity.patterns import parse_pattern
from hf_admm.sparsity.projections import project


OUTPUTS, INPUTS = 8, 16
NAME = "layer.0.weight"


@pytest.fixture
def onnx():
    return pytest.importorskip("onnx", reason="an extra of its own: onnx")


def weight(pattern="2:4", outputs=OUTPUTS, inputs=INPUTS):
    """`(out_features, in_features)`, sparse along its inputs."""
    torch.manual_seed(0)
    return project(torch.randn(outputs, inputs), parse_pattern(pattern)).numpy()


def save(onnx, path, nodes, constants, record=None, **flags):
    """A file with these nodes, whose input is `x` and whose output is `y`; constants are arrays or tensors."""
    tensors = [
        onnx.numpy_helper.from_array(value, name) if isinstance(value, np.ndarray) else value
        for name, value in constants.items()
    ]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xy"]
    graph = onnx.helper.make_graph(nodes, "graph", ends[:1], ends[1:], tensors)
    model = onnx.helper.make_model(graph)
    if record is not None:
        onnx.helper.set_model_props(model, {RECORD_KEY: record})
    onnx.save(model, path, **flags)
    return path


def product(onnx, op, inputs, domain="", scopes=None, name="", **attributes):
    node = onnx.helper.make_node(op, inputs, ["y"], name=name, domain=domain, **attributes)
    if scopes:
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=str(scopes))
    return node


PRODUCTS = {
    "x @ W": ("MatMul", ["x", NAME], {}, True),
    "W @ x": ("MatMul", [NAME, "x"], {}, False),
    "Gemm": ("Gemm", ["x", NAME], {}, True),
    "Gemm, transB": ("Gemm", ["x", NAME], {"transB": 1}, False),
    "Gemm, other way": ("Gemm", [NAME, "x"], {}, False),
    "Gemm, transA": ("Gemm", [NAME, "x"], {"transA": 1}, True),
    "FusedMatMul, transB": ("FusedMatMul", ["x", NAME], {"transB": 1, "domain": "com.microsoft"}, False),
}


@pytest.mark.parametrize("kind", PRODUCTS)
def test_the_direction_is_that_of_the_product(onnx, tmp_path, kind):
    op, inputs, attributes, transposed = PRODUCTS[kind]
    stored = {False: weight(), True: np.ascontiguousarray(weight().T)}
    for way, array in stored.items():
        # Square, so that the pattern fits either way and only the graph can tell.
        square = np.tile(array, (2, 1) if array.shape[0] == OUTPUTS else (1, 2))
        path = save(onnx, tmp_path / f"{way}.onnx", [product(onnx, op, inputs, **attributes)], {NAME: square})
        report = audit_checkpoint(path, "2:4")
        [found] = report.weights
        assert found.transposed == transposed and found.name == NAME
        assert report.ok == (way == transposed), "the opposite direction must fail"
        assert verify.main([str(path), "--pattern", "2:4"]) == (0 if way == transposed else 1)


def test_transposed_in_the_graph(onnx, tmp_path):
    nodes = [
        onnx.helper.make_node("Identity", [NAME], ["same"]),
        onnx.helper.make_node("Transpose", ["same"], ["turned"], perm=[1, 0]),
        product(onnx, "MatMul", ["x", "turned"]),
    ]
    square = np.tile(weight(), (2, 1))
    assert audit_checkpoint(save(onnx, tmp_path / "m.onnx", nodes, {NAME: square})).ok
    report = audit_checkpoint(save(onnx, tmp_path / "m.onnx", nodes, {NAME: np.ascontiguousarray(square.T)}))
    assert [failure.name for failure in report.failures] == [NAME]


def test_one_changed_entry_and_weights_that_are_not_multiplied(onnx, tmp_path):
    sparse = np.ascontiguousarray(weight().T)
    constants = {NAME: sparse, "embedding.weight": np.random.randn(10, 16).astype(np.float32)}
    constants |= {"bias": np.zeros(8, np.float32), "ids": np.zeros((4, 4), np.int64)}
    nodes = [product(onnx, "MatMul", ["x", NAME])]
    report = audit_checkpoint(save(onnx, tmp_path / "m.onnx", nodes, constants))
    assert {found.name: found.status for found in report.weights} == {NAME: "ok", "embedding.weight": "dense"}
    sparse[tuple(np.argwhere(sparse == 0)[0])] = 1e-30
    report = audit_checkpoint(save(onnx, tmp_path / "m.onnx", nodes, constants))
    assert [(found.name, found.broken) for found in report.failures] == [(NAME, 1)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_dtypes(onnx, tmp_path, dtype):
    array = np.ascontiguousarray(weight().T)
    kind = getattr(onnx.TensorProto, {"float64": "DOUBLE"}.get(dtype, dtype.upper()))
    tensor = onnx.helper.make_tensor(NAME, kind, array.shape, array.flatten())
    report = audit_checkpoint(
        save(onnx, tmp_path / "m.onnx", [product(onnx, "MatMul", ["x", NAME])], {NAME: tensor}), "2:4"
    )
    assert report.ok and report.sparsity == 0.5


def quantized(onnx, tmp_path, kind, zero_point):
    """int8 weights, whose zeros are not 0 where there is a zero point."""
    sparse = np.ascontiguousarray(np.tile(weight(), (2, 1)).T)
    zero = np.full(16, zero_point, np.uint8)
    constants = {f"{NAME}_quantized": (np.rint(sparse * 20) + zero_point).astype(np.uint8), "zero": zero}
    scales = {"scale": np.full(16, 0.05, np.float32), "one": np.ones((), np.float32), "none": np.zeros((), np.uint8)}
    constants |= scales
    name = f"{NAME}_quantized"
    if kind == "MatMulInteger":
        nodes = [product(onnx, kind, ["x", name, "none", "zero"])]
    elif kind == "QLinearMatMul":
        nodes = [product(onnx, kind, ["x", "one", "none", name, "scale", "zero", "one", "none"])]
    else:
        dequantize = onnx.helper.make_node("DequantizeLinear", [name, "scale", "zero"], ["w"], axis=1)
        nodes = [dequantize, product(onnx, "MatMul", ["x", "w"])]
    return save(onnx, tmp_path / "m.onnx", nodes, constants)


@pytest.mark.parametrize("kind", ["MatMulInteger", "QLinearMatMul", "DequantizeLinear"])
def test_quantized_zeros_are_counted(onnx, tmp_path, kind):
    report = audit_checkpoint(quantized(onnx, tmp_path, kind, 128))
    assert report.ok and [found.name for found in report.sparse] == [NAME]
    broken = audit_checkpoint(quantized(onnx, tmp_path, kind, 128), "1:4")
    assert [found.name for found in broken.failures] == [NAME]


def test_a_zero_point_for_each_block(onnx, tmp_path):
    sparse = np.ascontiguousarray(np.tile(weight(), (2, 1)).T)
    zero = np.array([[100], [30]], np.uint8).repeat(16, 1)  # one for each 8 of the 16 inputs
    whole = (np.rint(sparse * 10).astype(np.int32) + zero.repeat(8, 0)).astype(np.uint8)
    constants = {NAME: whole, "zero": zero, "scale": np.full(zero.shape, 0.1, np.float32)}
    nodes = [
        onnx.helper.make_node("DequantizeLinear", [NAME, "scale", "zero"], ["w"], axis=0, block_size=8),
        product(onnx, "MatMul", ["x", "w"]),
    ]
    assert audit_checkpoint(save(onnx, tmp_path / "m.onnx", nodes, constants)).ok


def test_packed_weights_are_refused(onnx, tmp_path):
    node = product(onnx, "MatMulNBits", ["x", "packed", "scale"], domain="com.microsoft", name="query", K=16, N=8)
    path = save(onnx, tmp_path / "m.onnx", [node], {"packed": np.zeros((8, 1, 8), np.uint8)})
    with pytest.raises(ValueError, match="packed form whose zeros can't be counted: query. Audit the model"):
        audit_checkpoint(path)


def test_constants_and_weights_used_in_a_branch(onnx, tmp_path):
    array = np.ascontiguousarray(weight().T)
    tensor = onnx.numpy_helper.from_array(array, NAME)
    inner = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Constant", [], ["other.weight"], value=tensor),
            onnx.helper.make_node("MatMul", ["x", "other.weight"], ["z"]),
            onnx.helper.make_node("MatMul", ["x", NAME], ["w"]),
        ],
        "branch",
        [],
        [onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, None)],
    )
    node = onnx.helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    report = audit_checkpoint(save(onnx, tmp_path / "m.onnx", [node], {NAME: array}))
    assert report.ok and {found.name for found in report.sparse} == {NAME, "other.weight"}
    assert all(found.transposed for found in report.sparse)


# ---- Names ----


@pytest.mark.parametrize(
    ("scopes", "node", "expected"),
    [
        (["", "encoder", "encoder.layer.0.query", "linear"], "node_MatMul_1", "encoder.layer.0.query.weight"),
        (None, "/encoder/layer.0/query/MatMul", "encoder.layer.0.query.weight"),
        (None, "", "val_7"),
        ("not a list", "MatMul", "val_7"),
    ],
)
def test_a_folded_weight_is_called_by_its_module(onnx, tmp_path, scopes, node, expected):
    nodes = [product(onnx, "MatMul", ["x", "val_7"], scopes=scopes, name=node)]
    path = save(onnx, tmp_path / "m.onnx", nodes, {"val_7": np.ascontiguousarray(weight().T)})
    assert [found.name for found in audit_checkpoint(path).weights] == [expected]
    if expected != "val_7":
        assert audit_checkpoint(path, expect=["query"]).ok
        assert not audit_checkpoint(path, expect=["query", "key"]).ok


# ---- Records ----


def test_a_record_tells_what_lost_its_zeros(onnx, tmp_path):
    nodes = [product(onnx, "MatMul", ["x", NAME])]
    sparse = np.ascontiguousarray(weight().T)
    record = record_text("2:4", {NAME: True})
    path = save(onnx, tmp_path / "m.onnx", nodes, {NAME: sparse}, record)
    assert audit_checkpoint(path).recorded == 1 and "no record" not in audit_checkpoint(path).verdict()
    dense = sparse + 1
    assert audit_checkpoint(save(onnx, path, nodes, {NAME: dense})).failures == []
    assert [found.name for found in audit_checkpoint(save(onnx, path, nodes, {NAME: dense}, record)).failures] == [
        NAME
    ]
    lost = audit_checkpoint(save(onnx, path, nodes, {"val_1": sparse}, record))
    assert "layer.0.weight (missing)" in lost.verdict()


def test_the_graph_outweighs_the_record(onnx, tmp_path):
    square = np.tile(weight(), (2, 1))  # sparse the way the record says, and multiplied the other way
    path = save(
        onnx,
        tmp_path / "m.onnx",
        [product(onnx, "MatMul", ["x", NAME])],
        {NAME: square},
        record_text("2:4", {NAME: False}),
    )
    assert [found.name for found in audit_checkpoint(path).failures] == [NAME]


def test_the_record_decides_where_the_graph_is_silent(onnx, tmp_path):
    square = np.tile(weight(), (2, 1))
    nodes = [product(onnx, "Identity", ["x"])]
    for transposed in (False, True):
        record = record_text("2:4", {NAME: transposed})
        path = save(onnx, tmp_path / "m.onnx", nodes, {NAME: square}, record)
        assert audit_checkpoint(path).ok != transposed


def test_a_damaged_record(onnx, tmp_path):
    path = save(onnx, tmp_path / "m.onnx", [product(onnx, "Identity", ["x"])], {}, "{")
    with pytest.raises(ValueError, match=r"The sparsity record in .*m.onnx is damaged"):
        audit_checkpoint(path)


# ---- Files ----


def test_weights_in_a_file_of_their_own(onnx, tmp_path):
    nodes = [product(onnx, "MatMul", ["x", NAME])]
    large = np.ascontiguousarray(weight(outputs=64, inputs=64).T)
    flags = {"save_as_external_data": True, "location": "m.onnx.data", "size_threshold": 0}
    path = save(onnx, tmp_path / "m.onnx", nodes, {NAME: large}, **flags)
    assert audit_checkpoint(path).ok and path.stat().st_size < large.nbytes
    (tmp_path / "m.onnx.data").unlink()
    with pytest.raises(ValueError, match=r"layer.0.weight of .*m.onnx can't be read .*must be beside it"):
        audit_checkpoint(path)


def test_files_that_are_not_onnx(onnx, tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"\xff\xff no model")
    with pytest.raises(ValueError, match="is not a readable ONNX file"):
        audit_checkpoint(tmp_path / "m.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty.onnx is not a readable ONNX file \(it is empty\)"):
        audit_checkpoint(tmp_path / "empty.onnx")
    (tmp_path / "empty.onnx").unlink()
    with pytest.raises(ValueError, match="none.onnx does not exist"):
        audit_checkpoint(tmp_path / "none.onnx")
    with pytest.raises(ValueError, match=r"weights found there: m.onnx\).*name an .onnx file itself"):
        audit_checkpoint(tmp_path)


def test_without_the_package(monkeypatch, tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match=r"To read .*m.onnx, install the package onnx: pip install hf-admm\[onnx\]"):
        audit_checkpoint(tmp_path / "m.onnx")
