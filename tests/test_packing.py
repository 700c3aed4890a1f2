"""Packing: the same bits back, in the promised sizes, as the documentation says."""

import json
import math
import re
from itertools import combinations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hf_admm import cli
from hf_admm.checkpoint_files import RECORD_NAME, WEIGHTS_NAME
from hf_admm.packing.checkpoints import TRAINING_FILES, pack_checkpoint, unpack_checkpoint
from hf_admm.packing.codec import Encoding, nm_encodings, obeys, pack, parse_encoding, unpack
from hf_admm.packing.header import build_header
from hf_admm.patterns import parse_pattern
from hf_admm.projections import project
from packed_samples import PACKED_NAME, round_trip, save, sparse


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]


class TestCodec:
    @pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "1:2", "3:7", "4:8", "8:16", "15:16"])
    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("groups", [1, 3, 35])
    def test_every_pattern_and_way(self, pattern, transposed, groups):
        pattern = parse_pattern(pattern)
        shape = (pattern.group_size * groups, 5) if transposed else (5, pattern.group_size * groups)
        entries = sparse(shape, str(pattern), transposed=transposed).view(torch.int32).view(-1)
        encoding = Encoding(pattern, transposed)
        assert parse_encoding(str(encoding)) == encoding and obeys(entries, encoding, shape)
        values, positions = pack(entries, encoding, shape)
        assert (len(values), len(positions)) == encoding.sizes(len(entries), 0)
        assert torch.equal(unpack(values, positions, encoding, shape, len(entries)), entries)
        step = encoding.step(shape)
        parts = [pack(part, encoding, shape) for part in entries.split(step)]
        assert torch.equal(torch.cat([part[0] for part in parts]), values), "a weight is packed in parts"
        assert torch.equal(torch.cat([part[1] for part in parts]), positions)

    def test_the_positions_of_2_4_are_those_of_the_documentation(self):
        encoding = Encoding(parse_pattern("2:4"))
        for number, kept in enumerate(sorted(combinations(range(4), 2), key=lambda c: sum(1 << i for i in c))):
            group = torch.zeros(4, dtype=torch.int16)
            group[list(kept)] = torch.tensor([7, 9], dtype=torch.int16)
            entries = torch.cat([torch.tensor([1, 1, 0, 0], dtype=torch.int16), group])
            values, positions = pack(entries, encoding, (1, 8))
            assert values.tolist() == [1, 1, 7, 9] and positions.tolist() == [6 * number]
        values, positions = pack(torch.tensor([0, 0, 0, 5], dtype=torch.int16), encoding, (1, 4))
        assert values.tolist() == [0, 5] and positions.tolist() == [3], "the lowest free position is filled"

    def test_zero_is_the_bits_not_the_number(self):
        entries = torch.tensor([-0.0, 0.0, -0.0, 1.0]).view(torch.int32)
        two = Encoding(parse_pattern("2:4"))
        assert not obeys(entries, two, (1, 4))
        with pytest.raises(ValueError, match="more than the 2 values"):
            pack(entries, two, (1, 4))
        assert len(pack(entries, Encoding(), (1, 4))[0]) == 3

    @pytest.mark.parametrize(
        ("encoding", "positions", "values", "complaint"),
        [
            ("2:4", [216], 2, "out of the range"),
            ("2:4", [6], 2, "out of the range"),  # a number for a second group, of which there is one
            ("2:4", [1, 1], 2, "2 bytes of positions"),
            ("2:4", [1], 3, "3 values for 2 positions"),
            ("mask", [0b10001], 2, "beyond the 4 entries"),
            ("mask", [0b1001], 3, "3 values for 2 positions"),
        ],
    )
    def test_impossible_parts(self, encoding, positions, values, complaint):
        positions = torch.tensor(positions, dtype=torch.uint8)
        with pytest.raises(ValueError, match=complaint):
            unpack(torch.ones(values, dtype=torch.int16), positions, parse_encoding(encoding), (1, 4), 4)

    @pytest.mark.parametrize("text", ["", "2:4 ", "4:4", "0:4", "9:17", "0.5", "4x4:8", "transposed", "02:4"])
    def test_unknown_encodings(self, text):
        with pytest.raises(ValueError, match="Unknown encoding|Invalid sparsity pattern"):
            parse_encoding(text)

    def test_patterns_without_groups_have_masks_only(self):
        assert not any(nm_encodings(parse_pattern(text)) for text in ("0.5", "4x4:8", "8:17", "4:4"))


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_patterns_and_dtypes(self, dtype, tmp_path):
        for pattern, expected in [("2:4", "2:4"), ("1:4", "1:4"), ("4:8", "4:8"), ("4x4:8", "mask"), ("0.5", "mask")]:
            tensors = {"a": sparse((16, 24), pattern, dtype), "bias": torch.ones(3).to(dtype)}
            tensors["flat"] = torch.zeros(64)
            report = round_trip(save(tmp_path / "model", tensors), pattern)
            assert report.encodings == {"a": expected}

    def test_what_is_packed_and_how(self, tmp_path):
        tensors = {
            "conv1d": sparse((16, 6), transposed=True),
            "experts": sparse((30, 8)).view(3, 10, 8),
            "broken": sparse((16, 24)),
            "emptier": project(torch.randn(16, 32), parse_pattern("1:16")),
            "nothing": torch.zeros(5, 7),
            "odd": sparse((5, 7), "0.5"),
            "dense": torch.randn(12, 8),
            "embedding": torch.cat([torch.zeros(1, 32), torch.randn(60, 32)]),
            "half empty integers": torch.tensor([[0, 0, 7, 8]] * 4),
            "none": torch.zeros(0, 4),
            "scalar": torch.tensor(3),
            "buffer": torch.ones(8, 8).tril().bool(),
            "wave": torch.zeros(4, 4, dtype=torch.complex64),
        }
        tensors["broken"][0, :4] = 1
        expected = {"conv1d": "2:4 transposed", "experts": "2:4", "broken": "mask", "emptier": "mask"}
        expected |= {"nothing": "mask", "odd": "mask", "half empty integers": "2:4"}
        folder = save(tmp_path / "model", tensors, {"format": "pt", "by": 'é "quoted"\n'})
        assert round_trip(folder).encodings == expected

    def test_names_that_parts_would_take(self, tmp_path):
        tensors = {name: sparse((16, 24)) for name in "abc"}
        tensors |= {"a.values": torch.ones(2), "b.positions": torch.ones(2)}
        assert round_trip(save(tmp_path / "model", tensors)).encodings == {"c": "2:4"}

    def test_more_than_one_piece(self, tmp_path, monkeypatch):
        monkeypatch.setattr("hf_admm.packing.files._PIECE", 1000)
        tensors = {"a": sparse((60, 64)), "b": sparse((64, 50), transposed=True), "c": sparse((61, 33), "0.5")}
        tensors["dense"] = torch.randn(50, 50)
        encodings = {"a": "2:4", "b": "2:4 transposed", "c": "mask"}
        assert round_trip(save(tmp_path / "model", tensors)).encodings == encodings

    def test_any_order_and_alignment(self, tmp_path):
        """Files that other programs wrote: tensors in any order, at odd offsets, a header that is not padded."""
        (tmp_path / "model").mkdir()
        a, b = sparse((8, 16)), sparse((8, 8), dtype=torch.bfloat16)
        entries = [("b", "BF16", [8, 8], 128), ("x", "U8", [3], 3), ("a", "F32", [8, 16], 512)]
        header = build_header({"format": "pt"}, entries).text.replace('"dtype"', ' "dtype"').rstrip().encode()
        content = len(header).to_bytes(8, "little") + header
        content += bytes(b.view(torch.uint8).numpy()) + b"xyz" + bytes(a.view(torch.uint8).numpy())
        (tmp_path / "model" / WEIGHTS_NAME).write_bytes(content)
        assert round_trip(tmp_path / "model").encodings == {"a": "2:4", "b": "2:4"}

    def test_one_file(self, tmp_path):
        save(tmp_path, {"a": sparse((16, 24))})
        report = pack_checkpoint(tmp_path / WEIGHTS_NAME, tmp_path / "small.safetensors")
        assert report.encodings == {"a": "2:4"} and not report.left_out
        unpack_checkpoint(tmp_path / "small.safetensors", tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / WEIGHTS_NAME).read_bytes()

    def test_the_recorded_pattern(self, tmp_path):
        folder = save(tmp_path / "model", {"a": sparse((16, 24), "3:8")})
        assert round_trip(folder).encodings == {"a": "mask"}
        record = {"format_version": 1, "pattern": "3:8", "targets": {"a": {"transposed": False}}}
        (folder / RECORD_NAME).write_text(json.dumps(record))
        assert round_trip(folder).encodings == {"a": "3:8"}
        assert round_trip(folder, "4:8").encodings == {"a": "mask"}


def sizes(model, folder, dtype):
    model.to(dtype).save_pretrained(folder)
    report = round_trip(folder)
    assert len(report.encodings) == 12 and set(report.encodings.values()) == {"2:4"}
    # Counted once more, and more strictly: all bytes of the file but those of tensors that it holds as they were.
    packed = folder.with_name(f"{folder.name}-packed") / PACKED_NAME
    with safe_open(packed, framework="pt") as file:
        kept = sum(
            file.get_tensor(name).nbytes for name in file.keys() if not re.search(r"\.(values|positions)$", name)
        )
    plain = load_file(folder / WEIGHTS_NAME)
    dense = sum(plain[name].nbytes for name in report.encodings)
    assert report.dense_bytes == dense and report.packed_bytes == packed.stat().st_size - kept
    assert report.ratio == report.packed_bytes / dense
    return report.ratio


@pytest.fixture
def sparse_bert(tiny_bert):
    """BERT-tiny's sizes, projected."""
    model = tiny_bert(hidden_size=128, intermediate_size=512)
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "encoder" in name:
            weight.data = project(weight.data, parse_pattern("2:4"))
    return model


def test_a_small_model_takes_what_is_promised(sparse_bert, tmp_path):
    assert sizes(sparse_bert, tmp_path / "fp32", torch.float32) <= 0.532
    assert sizes(sparse_bert, tmp_path / "bf16", torch.bfloat16) <= 0.5625


def test_what_is_unpacked_loads_with_transformers_alone(sparse_bert, tmp_path):
    sparse_bert.eval().save_pretrained(tmp_path / "model", max_shard_size="300KB")
    (tmp_path / "model" / "vocab.txt").write_text("[PAD]\n")
    (tmp_path / "model" / "1_Pooling").mkdir()
    (tmp_path / "model" / "1_Pooling" / "config.json").write_text("{}")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    report = pack_checkpoint(tmp_path / "model", tmp_path / "packed")
    assert len(report.encodings) == 12 and len(report.files) > 2
    assert not list((tmp_path / "packed").glob("model-*-of-?????.safetensors"))
    unpack_checkpoint(tmp_path / "packed", tmp_path / "plain")
    for file in (tmp_path / "model").rglob("*.*"):
        assert (tmp_path / "plain" / file.relative_to(tmp_path / "model")).read_bytes() == file.read_bytes()
    tokens = torch.arange(10)[None]
    loaded = type(sparse_bert).from_pretrained(tmp_path / "plain").eval()
    assert torch.equal(loaded(tokens).logits, sparse_bert(tokens).logits)


def test_gpt2_is_transposed(tiny_gpt2, tmp_path):
    model = tiny_gpt2(n_embd=32)
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and ".h." in name:
            weight.data = project(weight.data, parse_pattern("2:4"), transposed=True)
    model.save_pretrained(tmp_path / "model")
    report = round_trip(tmp_path / "model")
    assert len(report.encodings) == 8 and set(report.encodings.values()) == {"2:4 transposed"}


def test_training_files_are_left_out_and_said_so(tmp_path, capsys):
    folder = save(tmp_path / "model", {"a": sparse((16, 24))})
    unwanted = sorted(name.replace("*", "x") for name in TRAINING_FILES)
    for name in unwanted:
        (folder / name).write_text("")
    (folder / "config.json").write_text("{}")
    assert cli.main(["pack", str(folder), str(tmp_path / "packed")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == f"left out, no part of the model: {', '.join(unwanted)}"
    assert "1 of 1 tensors packed (1 as 2:4): 1,536 dense bytes in" in out[-2]
    assert sorted(file.name for file in (tmp_path / "packed").iterdir()) == ["config.json", PACKED_NAME]
    assert cli.main(["unpack", str(tmp_path / "packed"), str(tmp_path / "plain")]) == 0
    assert "1 of 1 tensors packed (1 as 2:4)" in capsys.readouterr().out


def read_as_documented(content):
    """Another reader, written from docs/packed_format.md alone: the bytes of the source."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = header["__metadata__"]
    source = json.loads(metadata["source_header"])
    encodings = {name: how for how, names in json.loads(metadata["packed"]).items() for name in names}
    text = metadata["source_header"].encode()
    restored = len(text).to_bytes(8, "little") + text
    part = lambda name: data[slice(*header[name]["data_offsets"])]  # noqa: E731
    names = sorted(source.keys() - {"__metadata__"}, key=lambda name: source[name]["data_offsets"])
    for name in names:
        if name not in encodings:
            restored += part(name)
            continue
        (start, end), shape = source[name]["data_offsets"], source[name]["shape"]
        count, columns = math.prod(shape), shape[-1]
        size = (end - start) // count
        values, positions = part(f"{name}.values"), part(f"{name}.positions")
        if encodings[name] == "mask":
            places = [i for i in range(count) if positions[i // 8] >> i % 8 & 1]
        else:
            pattern, *transposed = encodings[name].split(" ")
            n, m = map(int, pattern.split(":"))
            sets = sorted(combinations(range(m), n), key=lambda places: sum(2**place for place in places))
            base, words = len(sets), []
            for width in (1, 2, 4):
                words.append((max(d for d in range(40) if base**d <= 256**width) / width, -width))
            density, width = max(words)
            places = []
            for group in range(count // m):
                at = group // round(density * -width) * -width
                word = int.from_bytes(positions[at : at - width], "little")
                chosen = sets[word // base ** (group % round(density * -width)) % base]
                if transposed:
                    places += [(group // columns * m + place) * columns + group % columns for place in chosen]
                else:
                    places += [group * m + place for place in chosen]
        entries = bytearray(end - start)
        for index, place in enumerate(places):
            entries[place * size : (place + 1) * size] = values[index * size : (index + 1) * size]
        restored += entries
    return restored


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "3:7"])
def test_the_documentation_suffices_to_read_it(pattern, tmp_path):
    width = 4 * parse_pattern(pattern).group_size
    tensors = {"a": sparse((25, width), pattern), "b": sparse((width, 13), pattern, torch.float16, transposed=True)}
    tensors |= {"c": sparse((9, 7), "0.3"), "d": torch.randn(5), "none": torch.zeros(0, 4)}
    source = save(tmp_path / "model", tensors) / WEIGHTS_NAME
    report = pack_checkpoint(source, tmp_path / PACKED_NAME, pattern)
    assert report.encodings == {"a": pattern, "b": f"{pattern} transposed", "c": "mask"}
    assert read_as_documented((tmp_path / PACKED_NAME).read_bytes()) == source.read_bytes()
