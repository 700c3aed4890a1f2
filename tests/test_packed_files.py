"""Packed files: an error for every damage, nothing half written, and little memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from damage import JSON, damaged
from hf_admm import cli
from hf_admm.checkpoint_files import INDEX_NAME, WEIGHTS_NAME
from hf_admm.packing.checkpoints import pack_checkpoint, unpack_checkpoint
from hf_admm.packing.files import FORMAT_VERSION, open_packed
from hf_admm.packing.header import build_header, read_header
from hf_admm.packing.writing import plan_file, write_packed
from hf_admm.patterns import parse_pattern
from packed_samples import PACKED_NAME, save, sparse


class TestRefused:
    @pytest.fixture
    def folder(self, tmp_path):
        folder = save(tmp_path / "model", {"a": sparse((16, 24))})
        pack_checkpoint(folder, tmp_path / "packed")
        return folder

    @pytest.mark.parametrize(
        ("argv", "complaint"),
        [
            (["pack", "model", "packed"], "packed exists already"),
            (["pack", "model", "model"], "model exists already"),
            (["unpack", "packed", "model"], "model exists already"),
            (["pack", "model", "model/new"], "lies within"),
            (["pack", "model", "no/where"], "There is no folder"),
            (["pack", "nowhere", "new"], "does not exist"),
            (["pack", "x" * 5000, "new"], "File name too long"),
            (["pack", "model", "x" * 255], "File name too long"),
            (["unpack", "nowhere", "new"], "does not exist"),
            (["pack", f"model/{WEIGHTS_NAME}", "new"], "must end in .safetensors"),
            (["pack", "model", "new", "--pattern", "2-4"], "Invalid sparsity pattern"),
            (["pack", f"packed/{PACKED_NAME}", "new.safetensors"], "packed already"),
            (["pack", "packed", "new"], "holds neither model.safetensors"),
            (["unpack", "model", "new"], "holds no *.packed.safetensors"),
            (["unpack", f"model/{WEIGHTS_NAME}", "new.safetensors"], "has format 'pt', not 'hf_admm.packed'"),
        ],
    )
    def test_bad_input(self, folder, argv, complaint, capsys, monkeypatch):
        monkeypatch.chdir(folder.parent)
        before = sorted(folder.parent.rglob("*"))
        assert cli.main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and complaint in error
        assert sorted(folder.parent.rglob("*")) == before

    def test_nothing_is_sparse(self, tmp_path):
        folder = save(tmp_path / "model", {"a": torch.randn(16, 24)})
        with pytest.raises(ValueError, match="no matrix has 2:4 groups, nor zeros enough .*--pattern"):
            pack_checkpoint(folder, tmp_path / "packed")
        assert [file.name for file in tmp_path.iterdir()] == ["model"]

    def test_packed_and_plain_files_in_one_folder(self, folder):
        shutil.copy(folder.parent / "packed" / PACKED_NAME, folder)
        with pytest.raises(ValueError, match="holds packed files: model.packed.safetensors"):
            pack_checkpoint(folder, folder.parent / "new")
        with pytest.raises(ValueError, match="holds both model.safetensors and packed files"):
            unpack_checkpoint(folder, folder.parent / "new")
        assert not (folder.parent / "new").exists()

    def test_a_missing_shard(self, folder):
        packed = folder.parent / "packed"
        weight_map = {"a": WEIGHTS_NAME, "b": "2.safetensors"}
        (packed / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match="no packed files of: 2.safetensors"):
            unpack_checkpoint(packed, folder.parent / "new")
        (packed / INDEX_NAME).write_text("{")
        with pytest.raises(ValueError, match="index .* is damaged"):
            unpack_checkpoint(packed, folder.parent / "new")

    def test_another_version(self, folder):
        path = folder.parent / "packed" / PACKED_NAME
        old, new = (f'"format_version":"{version}"'.encode() for version in (FORMAT_VERSION, 7))
        path.write_bytes(path.read_bytes().replace(old, new))
        with pytest.raises(ValueError, match="format version '7', and this release .* reads 1. Unpack it with"):
            unpack_checkpoint(path.parent, folder.parent / "new")

    def test_a_full_disk_leaves_nothing(self, folder):
        code = (
            "import resource, signal, sys\nfrom hf_admm import cli\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            "sys.exit(cli.main(['pack', *sys.argv[1:]]))"
        )
        pytest.importorskip("resource")
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder), str(folder.parent / "new")],
            **{"capture_output": True, "text": True, "timeout": 60, "cwd": Path(__file__).parent.parent},
        )
        assert done.returncode == 2 and "new could not be written" in done.stderr, done.stderr
        assert sorted(file.name for file in folder.parent.iterdir()) == ["model", "packed"]


@pytest.fixture(scope="module")
def packed_file(tmp_path_factory):
    """A packed file with every encoding, its bytes, and those of its source."""
    folder = tmp_path_factory.mktemp("packed")
    tensors = {"a": sparse((8, 16)), "b": sparse((8, 10), dtype=torch.bfloat16, transposed=True)}
    tensors |= {"c": sparse((9, 7), "0.5"), "d": torch.randn(5)}
    save(folder, tensors)
    path = folder / PACKED_NAME
    report = pack_checkpoint(folder / WEIGHTS_NAME, path)
    assert report.encodings == {"a": "2:4", "b": "2:4 transposed", "c": "mask"}
    return path, path.read_bytes(), (folder / WEIGHTS_NAME).read_bytes()


def test_a_packed_file_is_a_safetensors_file(packed_file):
    with safe_open(packed_file[0], framework="pt") as file:
        names = {f"{name}.{part}" for name in "abc" for part in ("values", "positions")}
        assert set(file.keys()) == {*names, "d"} and file.metadata()["format_version"] == "1"
        assert file.get_tensor("a.values").shape == (64,) and file.get_tensor("a.positions").dtype == torch.uint8
    assert str(open_packed(packed_file[0]).encodings["b"]) == "2:4 transposed"


def unpacks_or_says_why(packed_file, content, *names):
    """Unpacks other content of the file: an error that names it, or the source's bytes."""
    path, _, source = packed_file
    damaged_file, plain = path.with_name("damaged.safetensors"), path.with_name("plain.safetensors")
    damaged_file.write_bytes(content)
    plain.unlink(missing_ok=True)
    try:
        unpack_checkpoint(damaged_file, plain)
    except ValueError as error:
        assert all(name in str(error) for name in ("damaged.safetensors", *names)), error
        assert sorted(file.name for file in path.parent.iterdir()) == [
            "damaged.safetensors",
            PACKED_NAME,
            WEIGHTS_NAME,
        ]
        return False
    assert plain.read_bytes() == source
    return True


@given(st.data())
def test_damaged_files(packed_file, data):
    unpacks_or_says_why(packed_file, data.draw(damaged(packed_file[1])))


def test_every_truncation_and_every_flipped_tensor(packed_file):
    path, content, _ = packed_file
    for size in range(0, len(content), 97):
        assert not unpacks_or_says_why(packed_file, content[:size])
    header = read_header(path)
    for entry in header.entries:
        for at in (header.start + entry.start, header.start + entry.start + entry.size - 1):
            flipped = bytearray(content)
            flipped[at] ^= 4
            assert not unpacks_or_says_why(packed_file, flipped, f"damaged in {entry.name[0]} (")


@given(
    st.sampled_from(["packed", "crc32", "source_header", "format"]),
    st.text(max_size=9) | JSON.map(json.dumps) | st.sampled_from(["[" * 100_000, '{"2:4": ["a", "a"]}', None])
    | st.dictionaries(st.sampled_from(["2:4", "1:4", "2:4 transposed", "mask"]),
                      st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), max_size=3), max_size=3).map(json.dumps),
)  # fmt: skip
def test_any_metadata(packed_file, field, value):
    path, content, _ = packed_file
    header = read_header(path)
    metadata = {**header.metadata, field: value}
    if value is None:
        del metadata[field]
    tensors = [(entry.name, entry.dtype, entry.shape, entry.size) for entry in header.entries]
    unpacks_or_says_why(packed_file, build_header(metadata, tensors).prefix + content[header.start :])


@given(st.integers(0, 6), st.sampled_from(["name", "dtype", "shape", "gone"]), st.data())
def test_any_entries(packed_file, index, what, data):
    path, content, _ = packed_file
    header = read_header(path)
    tensors = [[entry.name, entry.dtype, entry.shape, entry.size] for entry in header.entries]
    if what == "gone":
        start = header.start + header.entries[index].start
        content = content[:start] + content[start + tensors.pop(index)[3] :]
    elif what == "name":
        tensors[index][0] = data.draw(st.text(max_size=4))
    elif what == "dtype":
        tensors[index][1] = data.draw(st.sampled_from(["BF16", "I32", "F32", "BOOL", "F4", "X"]))
    else:
        tensors[index][2] = data.draw(st.lists(st.integers(0, 64), max_size=3))
    unpacks_or_says_why(packed_file, build_header(header.metadata, tensors).prefix + content[header.start :])


@pytest.mark.parametrize(
    ("old", "new"), [('"shape":[8,16]', '"shape":[16,8]'), ('"format":"pt"', '"format":"tf"'), ("    ", "   ")]
)
def test_a_source_header_that_fits_and_is_another(packed_file, old, new):
    """Nothing but its checksum tells."""
    path, content, _ = packed_file
    header = read_header(path)
    text = header.metadata["source_header"] + "    "
    metadata = {**header.metadata, "source_header": text.replace(old, new, 1)}
    tensors = [(entry.name, entry.dtype, entry.shape, entry.size) for entry in header.entries]
    changed = build_header(metadata, tensors).prefix + content[header.start :]
    assert not unpacks_or_says_why(packed_file, changed, "the checksums are not those of the source's header")


def test_a_tensor_too_many(packed_file):
    path, content, _ = packed_file
    header = read_header(path)
    tensors = [(entry.name, entry.dtype, entry.shape, entry.size) for entry in header.entries]
    prefix = build_header(header.metadata, [*tensors, ("e", "U8", (2,), 2)]).prefix
    assert not unpacks_or_says_why(packed_file, prefix + content[header.start :] + b"ab", "damaged in e (not expected")


def test_a_source_that_changes_meanwhile(tmp_path):
    path = save(tmp_path / "model", {"a": sparse((16, 24))}) / WEIGHTS_NAME
    plan = plan_file(path, parse_pattern("2:4"))
    save(tmp_path / "model", {"a": sparse((16, 24), seed=1)})
    with pytest.raises(ValueError, match="model.safetensors does not unpack to it: it was written to meanwhile"):
        write_packed(plan, tmp_path / "packed.safetensors")


MEMORY = """
import re, sys, threading, time
import torch
from hf_admm import cli
torch.set_num_threads(1)
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
def sample():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)
import hf_admm.commands.pack, hf_admm.commands.unpack
start = anonymous()
peak = [start]
threading.Thread(target=sample, daemon=True).start()
assert cli.main(sys.argv[1:]) == 0
print("GROWN", max(peak[0], anonymous()) - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_model_is_never_in_memory_as_a_whole(tmp_path):
    """160 MB of layers and an embedding of 40 MB, which is not in memory as a whole either."""
    layer, transposed = sparse((1024, 1024)), sparse((1024, 1024), transposed=True)
    tensors = [("embedding", "F32", [10240, 1024], 40 << 20)]
    tensors += [(f"{index}", "F32", [1024, 1024], 4 << 20) for index in range(40)]
    (tmp_path / "model").mkdir()
    with open(tmp_path / "model" / WEIGHTS_NAME, "wb") as file:
        file.write(build_header({"format": "pt"}, tensors).prefix)
        for _ in range(10):
            file.write(torch.randn(1024, 1024).numpy())
        for _ in range(20):
            file.write(layer.numpy())
            file.write(transposed.numpy())
    for command in (["pack", "model", "packed"], ["unpack", "packed", "plain"]):
        paths = [str(tmp_path / path) for path in command[1:]]
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, command[0], *paths],
            **{"capture_output": True, "text": True, "timeout": 120, "cwd": Path(__file__).parent.parent},
        )
        assert done.returncode == 0, done.stderr
        assert "20 as 2:4, 20 as 2:4 transposed" in done.stdout
        grown = float(done.stdout.split("GROWN")[1])
        assert grown < 50, f"{command[0]} of a model of 200 MB took {grown:.0f} MB"
    assert (tmp_path / "plain" / WEIGHTS_NAME).read_bytes() == (tmp_path / "model" / WEIGHTS_NAME).read_bytes()
    for folder in tmp_path.iterdir():
        shutil.rmtree(folder)
