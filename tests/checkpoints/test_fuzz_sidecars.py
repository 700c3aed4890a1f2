"""Damaged and made-up sidecars: an error that names the file with all left as it was, or exactly what was saved."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from damage import JSON, damaged, stored
from hf_admm.checkpoints import sidecar
from hf_admm.checkpoints.sidecar import SIDECAR_NAME, load_sidecar, save_sidecar
from sidecars import SETTINGS, assert_same, load, model_and_state, snapshot, trained


@pytest.fixture(scope="module", params=["admm", "dense_phase", "srste"])
def saved(request, tmp_path_factory):
    """The folder of a sidecar of each phase, its bytes, and what it restores."""
    folder = tmp_path_factory.mktemp(request.param)
    save_sidecar(trained(request.param)[1], folder)
    model, state = model_and_state()
    load_sidecar(state, folder, SETTINGS)
    return folder, (folder / SIDECAR_NAME).read_bytes(), snapshot(model, state)


def write(folder, tensors, settings, text=None):
    """A sidecar that is whole, whatever it says."""
    text = json.dumps(settings) if text is None else text
    metadata = {"hf_admm": text, "crc32": sidecar.checksum(text, sorted(tensors.items()))}
    save_file(tensors, folder / SIDECAR_NAME, metadata=metadata)


def parts(folder, content):
    (folder / SIDECAR_NAME).write_bytes(content)
    with safe_open(folder / SIDECAR_NAME, framework="pt") as file:
        settings = json.loads(file.metadata()["hf_admm"])
    return {name: tensor.clone() for name, tensor in load_file(folder / SIDECAR_NAME).items()}, settings


@given(st.data())
def test_a_damaged_sidecar_is_refused_or_restores_the_same(saved, data):
    folder, content, expected = saved
    (folder / SIDECAR_NAME).write_bytes(data.draw(damaged(content)))
    restored = load(folder)
    if restored is not None:
        assert_same(restored, expected)


def test_every_single_bit_counts(saved):
    """A flipped bit in a tensor is a legal number, so only the checksum can tell."""
    folder, content, _ = saved
    start = 8 + int.from_bytes(content[:8], "little")
    for at in range(start, len(content), 7):
        changed = bytearray(content)
        changed[at] ^= 1 << at % 8
        (folder / SIDECAR_NAME).write_bytes(changed)
        assert load(folder) is None


@given(st.data())
def test_any_settings_are_refused_or_legal(saved, data):
    folder, content, expected = saved
    tensors, settings = parts(folder, content)
    name = data.draw(st.sampled_from(sorted(settings)))
    if data.draw(st.booleans()):
        del settings[name]
    else:
        near = st.sampled_from(["admm", "srste", "sparse", -1, 0, 7, 0.5, True, math.nan, math.inf, "2:4", "4:8", {}])
        settings[name] = data.draw(near | JSON)
    write(folder, tensors, settings)
    restored = load(folder)
    if restored is not None:
        phase, rho, updated_at, figures, resumed = restored[0]
        assert phase == expected[0][0] and 0 <= rho < math.inf and updated_at >= 0 and resumed
        assert all(isinstance(figure, float) for figure in figures.values())
        assert_same((None, restored[1]), (None, expected[1]))


@given(st.text() | JSON.map(json.dumps) | st.sampled_from(["[" * 100_000, '{"format_version": 1}', "1" * 5000]))
def test_any_text_in_the_place_of_the_settings_is_refused(saved, text):
    folder, content, _ = saved
    tensors, _ = parts(folder, content)
    write(folder, tensors, None, text)
    assert load(folder) is None


@given(st.data())
def test_wrong_tensors_are_refused(saved, data):
    """Each of these would load into a state, and train on to a wrong result."""
    folder, content, _ = saved
    tensors, settings = parts(folder, content)
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor, mask = tensors[name], name.startswith("mask/")
    shapes = st.sampled_from([(1,), (1, 1), (), (0, 8), (2, 2), (4,), tuple(tensor.shape) + (1,)])
    dtypes = stored([torch.int8, torch.int32, torch.uint8, torch.complex64, torch.float8_e4m3fn])
    change = data.draw(st.sampled_from(["missing", "renamed", "extra", "shape", "dtype", "value"]))
    if change in ("missing", "renamed"):
        del tensors[name]
    if change in ("renamed", "extra"):
        tensors[data.draw(st.text(max_size=8) | st.just("anchor/0.weight.")) + "~"] = tensor.clone()
    elif change == "shape":
        tensors[name] = torch.zeros(data.draw(shapes), dtype=tensor.dtype)
    elif change == "dtype":
        tensors[name] = tensor.to(data.draw(dtypes) if not mask else torch.float32)
    elif change == "value":
        at = tuple(data.draw(st.integers(0, side - 1)) for side in tensor.shape)
        tensor[at] = tensor[at] ^ 4 if mask else data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    write(folder, tensors, settings)
    assert load(folder) is None


def test_a_sidecar_may_hold_a_weight_at_any_precision_and_other_bits(saved):
    """What is whole is not second-guessed: numbers are numbers."""
    folder, content, expected = saved
    tensors, settings = parts(folder, content)
    tensors["weight/0.weight"] = tensors["weight/0.weight"].double() + 1
    write(folder, tensors, settings)
    assert torch.equal(load(folder)[1]["0.weight"], expected[1]["0.weight"] + 1)


def test_what_was_loaded_does_not_follow_the_file(saved):
    folder, content, expected = saved
    (folder / SIDECAR_NAME).write_bytes(content)
    model, state = model_and_state()
    load_sidecar(state, folder, SETTINGS)
    with open(folder / SIDECAR_NAME, "r+b") as file:
        file.write(b"\0" * len(content))
    assert_same(snapshot(model, state), expected)
