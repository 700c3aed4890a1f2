"""The sidecar as a folder of shards: it restores what the file does, and damage of any of its files is refused."""

import json
import os
import pickle
import re
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from damage import damaged
from hf_admm.checkpoints import sidecar_folder
from hf_admm.checkpoints.distributed_files import INDEX_OF_SHARDS, read_index
from hf_admm.checkpoints.sidecar import (
    SHARDED_SIDECAR_NAME,
    SIDECAR_NAME,
    check_sidecar,
    checksum,
    find_sidecar,
    load_sidecar,
    save_sidecar,
)
from hf_admm.checkpoints.sidecar_folder import HEADER_NAME
from hf_admm.sparsity.patterns import parse_pattern
from sidecars import PATTERN, SETTINGS, assert_same, load, model_and_state, snapshot, trained


FILES = ("__0_0.distcp", INDEX_OF_SHARDS, HEADER_NAME)


@pytest.fixture(scope="module", params=["admm", "dense_phase", "srste"])
def saved(request, tmp_path_factory):
    """The folder of a sidecar of each phase, the bytes of its files, and what it restores."""
    folder = tmp_path_factory.mktemp(request.param)
    _, state = trained(request.param)
    save_sidecar(state, folder)
    expected = load(folder)
    save_sidecar(state, folder, sharded=True)
    assert {path.name for path in folder.iterdir()} == {SHARDED_SIDECAR_NAME}
    place = folder / SHARDED_SIDECAR_NAME
    assert {file.name for file in place.iterdir()} == set(FILES)
    return folder, {file.name: file.read_bytes() for file in place.iterdir()}, expected


@pytest.fixture
def place(saved):
    folder, files, _ = saved
    yield folder / SHARDED_SIDECAR_NAME
    write_all(folder, files)


def write_all(folder, files):
    for name, content in files.items():
        (folder / SHARDED_SIDECAR_NAME / name).write_bytes(content)


def resign(place, **changes):
    """A header that vouches for the files as they are."""
    header = json.loads((place / HEADER_NAME).read_text()) | changes
    header["files"] = {name: sidecar_folder._sum_of(place / name) for name in FILES[:2]}
    header["crc32"] = checksum(header["hf_admm"] + json.dumps(header["files"]), ())
    (place / HEADER_NAME).write_text(json.dumps(header))


def test_it_restores_what_the_file_does(saved):
    folder, files, expected = saved
    write_all(folder, files)
    assert_same(load(folder), expected)


@given(data=st.data(), name=st.sampled_from(FILES))
def test_a_damaged_folder_is_refused_or_restores_the_same(saved, data, name):
    folder, files, expected = saved
    write_all(folder, files)
    (folder / SHARDED_SIDECAR_NAME / name).write_bytes(data.draw(damaged(files[name])))
    restored = load(folder)
    if restored is not None:
        assert_same(restored, expected)


@pytest.mark.parametrize("name", FILES)
def test_every_bit_of_every_file_counts(saved, place, name):
    folder, files, _ = saved
    content = files[name]
    for at in range(0, len(content), max(1, len(content) // 60)):
        changed = bytearray(content)
        changed[at] ^= 1 << at % 8
        (place / name).write_bytes(changed)
        assert load(folder) is None


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_shortened_file_is_told_by_the_header(saved, place, name):
    """Before anything is loaded, as a resume checks it first."""
    folder, files, _ = saved
    targets = model_and_state()[1].targets
    for change in (lambda: (place / name).write_bytes(files[name][:-1]), (place / name).unlink):
        change()
        with pytest.raises(ValueError, match=r"can't be read as the sidecar .* Resume from another checkpoint"):
            check_sidecar(folder, PATTERN, targets)


def test_another_run_is_refused(saved, place):
    folder, _, _ = saved
    targets = model_and_state()[1].targets
    with pytest.raises(ValueError, match="was trained with sparsity_pattern='2:4', this run has '1:4'"):
        check_sidecar(folder, parse_pattern("1:4"), targets)
    with pytest.raises(ValueError, match="pattern 2:4.*sparsity_pattern='none'"):
        check_sidecar(folder, None, {})
    fewer = dict(list(targets.items())[1:])
    with pytest.raises(ValueError, match="other targets"):
        check_sidecar(folder, PATTERN, fewer)
    text = json.loads((place / HEADER_NAME).read_text())["hf_admm"]
    resign(place, hf_admm=text.replace('"format_version": 3', '"format_version": 4'))
    with pytest.raises(ValueError, match="format version 4, this release reads 3"):
        check_sidecar(folder, PATTERN, targets)


def test_tensors_that_do_not_fit_the_settings_are_refused(saved, place):
    folder, _, _ = saved
    settings = json.loads(json.loads((place / HEADER_NAME).read_text())["hf_admm"])
    settings["others"] = {"0.bias": [4]}
    resign(place, hf_admm=json.dumps(settings))
    with pytest.raises(ValueError, match="tensors missing, not expected.*other/0.bias"):
        check_sidecar(folder, PATTERN, model_and_state()[1].targets)


def test_values_that_no_training_can_go_on_with_are_refused(tmp_path):
    for phase, kind in (("admm", "anchor"), ("srste", "mask")):
        folder = tmp_path / phase
        folder.mkdir()
        _, state = trained(phase)
        tensor = next(iter(state.phase.companions.values()))
        tensor.view(-1)[0] = tensor.view(-1)[0] ^ 4 if kind == "mask" else torch.nan
        save_sidecar(state, folder, sharded=True)
        message = "mask/0.weight breaks pattern 2:4" if kind == "mask" else "NaN or infinities in: anchor/0.weight"
        model, state = model_and_state()
        before = snapshot(model, state)
        with pytest.raises(ValueError, match=message):
            load_sidecar(state, folder, SETTINGS)
        assert_same(snapshot(model, state), before)


class Payload:
    """What a pickle of bad faith would have torch run."""

    def __reduce__(self):
        return os.mkdir, (os.environ["HF_ADMM_PAYLOAD"],)


def test_an_index_runs_no_code(saved, place, tmp_path, monkeypatch):
    folder, _, _ = saved
    monkeypatch.setenv("HF_ADMM_PAYLOAD", str(tmp_path / "run"))
    (place / INDEX_OF_SHARDS).write_bytes(pickle.dumps(Payload()))
    resign(place)
    with pytest.raises(ValueError, match=re.escape(f"{os.mkdir.__module__}.mkdir is no part of an index")):
        read_index(place)
    assert load(folder) is None and not (tmp_path / "run").exists()


def test_the_forms_replace_each_other(tmp_path):
    _, state = trained("admm")
    for _ in range(2):
        save_sidecar(state, tmp_path, sharded=True)
        assert [path.name for path in tmp_path.iterdir()] == [SHARDED_SIDECAR_NAME]
        save_sidecar(state, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [SIDECAR_NAME]


def test_a_folder_that_was_about_to_be_replaced_is_found(saved, tmp_path):
    """A kill between the two renames."""
    folder, files, expected = saved
    write_all(folder, files)
    shutil.copytree(folder / SHARDED_SIDECAR_NAME, tmp_path / f"{SHARDED_SIDECAR_NAME}.replaced")
    (tmp_path / f"{SHARDED_SIDECAR_NAME}.tmp").mkdir()
    assert find_sidecar(tmp_path).path.name.endswith(".replaced")
    assert_same(load(tmp_path), expected)


def test_a_folder_that_others_do_not_see_is_an_error(tmp_path, monkeypatch):
    """Machines with disks of their own."""
    _, state = trained("admm")
    save = sidecar_folder.save_shards

    def elsewhere(tensors, folder):
        save(tensors, folder)
        monkeypatch.setattr(sidecar_folder, "together", lambda step: [step(), {"__1_0.distcp": [8, "0"]}])

    monkeypatch.setattr(sidecar_folder, "save_shards", elsewhere)
    with pytest.raises(OSError, match="does not see __1_0.distcp.*all machines share"):
        save_sidecar(state, tmp_path, sharded=True)
    assert find_sidecar(tmp_path) is None
