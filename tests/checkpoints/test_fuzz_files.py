"""Damaged and made-up checkpoints under `hf-admm verify`: an error that names the file, or the right report."""

import io
import json
import math
import shutil
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from damage import JSON, damaged, stored
from hf_admm import cli
from hf_admm.audit import audit_checkpoint
from hf_admm.checkpoints.files import INDEX_NAME, RECORD_NAME, WEIGHTS_NAME
from hf_admm.sparsity.patterns import parse_pattern
from hf_admm.sparsity.projections import project


PATTERN = parse_pattern("2:4")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a sparse checkpoint, its record, and the bytes of both."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    tensors = {"a.weight": project(torch.randn(4, 8), PATTERN), "b.weight": torch.randn(4, 6), "b.bias": torch.ones(4)}
    tensors |= {"c.weight": project(torch.randn(8, 4), PATTERN, transposed=True)}
    save_file(tensors, folder / WEIGHTS_NAME)
    record = {"format_version": 1, "pattern": "2:4", "targets": {}}
    record["targets"] = {"a.weight": {"transposed": False}, "c.weight": {"transposed": True}}
    (folder / RECORD_NAME).write_text(json.dumps(record))
    return folder, (folder / WEIGHTS_NAME).read_bytes(), (folder / RECORD_NAME).read_text()


def reset(checkpoint):
    folder, weights, record = checkpoint
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / WEIGHTS_NAME).write_bytes(weights)
    (folder / RECORD_NAME).write_text(record)
    return folder


def audit(path, *names):
    """The report, or `None` if the error named one of the files; `hf-admm verify` says the same in its way."""
    try:
        report = audit_checkpoint(path)
    except ValueError as error:
        assert any(name in str(error) for name in names), error
        report = None
    for flags in ([], ["--json"]):
        out, err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = cli.main(["verify", str(path), *flags])
        assert code == (2 if report is None else 0 if report.ok else 1)
        assert (report is None) == err.getvalue().startswith("error: ") and "Traceback" not in err.getvalue()
    return report


def assert_right(report, tensors):
    """Counts once more, without the library."""
    for weight in report.weights:
        if weight.status == "missing":
            assert weight.name not in tensors
            continue
        tensor = tensors[weight.name]
        assert weight.shape == tuple(tensor.shape) and weight.zeros == sum(n == 0 for n in tensor.flatten().tolist())
        if weight.sparse:
            rows = (tensor.t() if weight.transposed else tensor).tolist()
            quads = [row[i : i + 4] for row in rows for i in range(0, len(row), 4)]
            assert weight.groups == len(quads)
            assert weight.broken == sum(sum(number != 0 for number in quad) > 2 for quad in quads)


@given(st.data())
def test_damaged_weights(checkpoint, data):
    folder = reset(checkpoint)
    (folder / WEIGHTS_NAME).write_bytes(data.draw(damaged(checkpoint[1])))
    report = audit(folder, WEIGHTS_NAME)
    if report is not None:
        assert_right(report, load_file(folder / WEIGHTS_NAME))


DTYPES = stored(
    [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float64]
    + [torch.bool, torch.uint8, torch.int64, torch.uint16, torch.complex64]
)
SHAPES = st.sampled_from([(), (0,), (4,), (4, 4), (0, 4), (4, 0), (3, 5), (8, 4), (1, 4), (2, 2, 4)])


@given(st.dictionaries(st.text(max_size=6) | st.just("a.weight"), st.tuples(SHAPES, DTYPES), max_size=3))
def test_tensors_of_every_shape_and_dtype(checkpoint, kinds):
    folder, tensors = reset(checkpoint), {}
    for name, (shape, dtype) in kinds.items():
        raw = torch.randint(0, 2, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
        tensors[name] = raw.view(dtype).reshape(shape)
    save_file(tensors, folder / WEIGHTS_NAME)
    wide = {name: t if t.is_complex() else t.double() for name, t in tensors.items()}
    assert_right(audit(folder), wide)


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch has no packed numbers")
@pytest.mark.parametrize(("name", "shape"), [("a.weight", (4, 4)), ("a.weight", (8,)), ("other", (4, 4))])
def test_packed_numbers_are_refused(checkpoint, name, shape):
    folder = reset(checkpoint)
    packed = torch.zeros(shape, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    save_file({name: packed}, folder / WEIGHTS_NAME)
    assert audit(folder, f"{name} in {folder} is of dtype torch.float4_e2m1fn_x2, which packs two numbers") is None


HALF_A_PAIR = b'{"format_version": 1, "pattern": "2:4", "targets": {"\\ud800": {"transposed": true}}}'


@example(HALF_A_PAIR)
@given(JSON.map(json.dumps).map(str.encode) | st.binary() | st.sampled_from([b"[" * 100_000, b"1" * 5000, b'"\xff"']))
def test_any_record_is_refused_by_name(checkpoint, content):
    folder = reset(checkpoint)
    (folder / RECORD_NAME).write_bytes(content)
    assert audit(folder, RECORD_NAME) is None


@given(st.data())
@example(None)
def test_a_record_with_a_wrong_entry(checkpoint, data):
    folder, record = reset(checkpoint), json.loads(checkpoint[2])
    where = [record, record["targets"], record["targets"]["c.weight"]]
    place = where[0] if data is None else data.draw(st.sampled_from(where))
    key = "pattern" if data is None else data.draw(st.sampled_from(sorted(place)) | st.text(max_size=4))
    values = JSON | st.sampled_from(["1:4", "4:8", "0.5", {"transposed": True}, {"transposed": False}, True, False, 1])
    place[key] = ["2:4"] if data is None else data.draw(values)
    (folder / RECORD_NAME).write_text(json.dumps(record))
    report = audit(folder, RECORD_NAME)
    if report is not None:
        assert report.pattern == record["pattern"] == str(parse_pattern(record["pattern"]))
        named = {weight.name: weight.transposed for weight in report.weights if weight.name in record["targets"]}
        missing = {weight.name for weight in report.weights if weight.status == "missing"}
        assert named.keys() == record["targets"].keys()
        assert all(named[n] is entry["transposed"] for n, entry in record["targets"].items() if n not in missing)
        if report.pattern == "2:4":
            assert_right(report, load_file(folder / WEIGHTS_NAME))


SHARDS = st.sampled_from(["1.safetensors", "../outside.safetensors", "/etc/hostname", "sub/1.safetensors", "x" * 5000]
                         + ["a\0b", ".", "..", "", "\ud800", RECORD_NAME, INDEX_NAME, "gone.safetensors"])  # fmt: skip
NAMES = st.sampled_from(["a.weight", "b.weight", "b.bias", "c.weight", "absent"]) | st.text(max_size=4)


@given(st.dictionaries(NAMES, SHARDS | JSON, max_size=4) | JSON)
@example({"a.weight": "../outside.safetensors"})
@example({"a.weight": "1.safetensors"})
def test_any_index(checkpoint, weight_map):
    folder = reset(checkpoint)
    (folder / WEIGHTS_NAME).rename(folder / "1.safetensors")
    (folder / "sub").mkdir()
    for place in (folder.parent / "outside.safetensors", folder / "sub" / "1.safetensors"):
        shutil.copy(folder / "1.safetensors", place)
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    report = audit(folder, INDEX_NAME, "1.safetensors", RECORD_NAME)
    tensors = load_file(folder / "1.safetensors")
    legal = isinstance(weight_map, dict) and all(
        shard == "1.safetensors" and name in tensors for name, shard in weight_map.items()
    )
    assert legal == (report is not None), "no file but those beside the index is ever read"
    if report is not None:
        assert_right(report, {name: tensors[name] for name in weight_map})


@given(st.binary() | st.just(b"[" * 100_000))
def test_an_index_of_any_bytes(checkpoint, content):
    folder = reset(checkpoint)
    (folder / WEIGHTS_NAME).unlink()
    (folder / INDEX_NAME).write_bytes(content)
    assert audit(folder, INDEX_NAME) is None


@given(st.text(max_size=12) | st.sampled_from(["x" * 5000, "a\0b", "..", "org/name", "~", "", "%s"]))
def test_any_path(tmp_path_factory, path):
    err = io.StringIO()
    base = tmp_path_factory.getbasetemp() / "none such"
    with redirect_stdout(io.StringIO()), redirect_stderr(err):
        code = cli.main(["verify", f"{base}/{path}"])
    assert code == 2 and err.getvalue().startswith("error: ")
