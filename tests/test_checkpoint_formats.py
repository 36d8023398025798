"""Our readers and writers against the safetensors library and torch.save / torch.load."""

import json
from collections import OrderedDict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from evla_cli.checkpoint.reader import open_huggingface_checkpoint, open_torch_checkpoint
from evla_cli.checkpoint.safetensors_format import read_safetensors, write_safetensors
from evla_cli.checkpoint.tensors import LazyTensor
from evla_cli.checkpoint.torch_format import read_torch, write_torch
from evla_cli.checkpoint.writer import parse_size, split_into_shards, write_huggingface_weights

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OTHERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def lazy(tensors):
    return {name: LazyTensor(t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()}


def every_kind():
    """All dtypes; odd sizes, so that offsets are unaligned; scalars and empty tensors; names beyond ASCII."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in FLOATS:
        tensors[f"float.{dtype}"] = torch.randn(3, 5, generator=generator).to(dtype)
    for dtype in OTHERS:
        tensors[f"other.{dtype}"] = torch.randint(0, 100, (7,), generator=generator).to(dtype)
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.empty(0, 4)
    tensors["größe"] = torch.ones(1, 1, 3, dtype=torch.bfloat16)
    return tensors


def assert_same(loaded, expected):
    assert set(loaded) == set(expected)
    for name, tensor in expected.items():
        found = loaded[name].load() if isinstance(loaded[name], LazyTensor) else loaded[name]
        assert found.dtype == tensor.dtype, name
        assert found.shape == tensor.shape, name
        assert torch.equal(found, tensor), name


class TestSafetensors:
    def test_library_reads_what_we_write(self, tmp_path):
        write_safetensors(tmp_path / "m.safetensors", lazy(every_kind()), {"format": "pt"})
        assert_same(load_file(tmp_path / "m.safetensors"), every_kind())
        with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
            assert file.metadata() == {"format": "pt"}

    def test_we_read_what_the_library_writes(self, tmp_path):
        save_file(every_kind(), tmp_path / "m.safetensors", {"format": "pt"})
        assert_same(read_safetensors(tmp_path / "m.safetensors"), every_kind())

    def test_non_contiguous_tensors_are_written_in_row_major_order(self, tmp_path):
        base = torch.arange(24.0).view(4, 6)
        tensors = {"transposed": base.T, "strided": base[:, ::2], "expanded": base[:1].expand(3, 6)}
        write_safetensors(tmp_path / "m.safetensors", lazy(tensors), {})
        assert_same(load_file(tmp_path / "m.safetensors"), tensors)

    def test_same_input_gives_the_same_bytes(self, tmp_path):
        for name in ("a", "b"):
            write_safetensors(tmp_path / name, lazy(every_kind()), {"format": "pt"})
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

    def test_data_starts_at_a_multiple_of_8(self, tmp_path):
        for length in range(1, 12):
            path = tmp_path / f"{length}.safetensors"
            write_safetensors(path, lazy({"n" * length: torch.ones(2)}), {})
            assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


class TestShards:
    def test_index_and_shards_are_what_transformers_expects(self, tmp_path):
        tensors = {f"t{i}": torch.full((10, 10), float(i)) for i in range(7)}  # 400 bytes each
        write_huggingface_weights(tmp_path, lazy(tensors), max_shard_bytes=900)
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        names = [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
        assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == names
        assert index["metadata"]["total_size"] == 2800
        assert list(index["weight_map"]) == list(tensors)
        merged = {}
        for name in names:
            part = load_file(tmp_path / name)
            assert set(part) == {tensor for tensor, file in index["weight_map"].items() if file == name}
            merged |= part
        assert_same(merged, tensors)
        assert_same(open_huggingface_checkpoint(tmp_path).tensors, tensors)

    def test_one_shard_has_no_index(self, tmp_path):
        write_huggingface_weights(tmp_path, lazy({"a": torch.ones(3)}))
        assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]

    def test_a_tensor_larger_than_a_shard_gets_its_own(self):
        tensors = lazy({"small": torch.ones(2), "large": torch.ones(100), "last": torch.ones(2)})
        assert [list(shard) for shard in split_into_shards(tensors, 16)] == [["small"], ["large"], ["last"]]

    @pytest.mark.parametrize(
        ("text", "size"), [("5GB", 5 * 10**9), ("1.5 KiB", 1536), ("500mb", 5 * 10**8), ("700000", 700_000)]
    )
    def test_sizes(self, text, size):
        assert parse_size(text) == size


def nested():
    """As CogACT saves: dicts in dicts, float32 beside bfloat16."""
    flat = every_kind()
    return {
        "model": OrderedDict(
            projector=OrderedDict((name, tensor) for name, tensor in flat.items() if name.startswith("float")),
            llm_backbone=OrderedDict((name, tensor) for name, tensor in flat.items() if name.startswith("other")),
        ),
        "scalar": flat["scalar"],
        "empty": flat["empty"],
    }


def leaves(tree, prefix=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


class TestTorchFiles:
    def test_we_read_what_torch_saves(self, tmp_path):
        torch.save({**nested(), "epoch": 3, "name": "run"}, tmp_path / "m.pt")
        file = read_torch(tmp_path / "m.pt")
        assert_same(file.tensors, {".".join(keys): tensor for keys, tensor in leaves(nested())})
        assert file.others == {"epoch": 3, "name": "run"}
        assert file.paths["model.projector.float.torch.float32"] == ("model", "projector", "float.torch.float32")

    @pytest.mark.parametrize("mmap", [True, False])
    def test_torch_loads_what_we_write(self, tmp_path, mmap):
        source = {".".join(keys): (keys, tensor) for keys, tensor in leaves(nested())}
        tensors = lazy({name: tensor for name, (_, tensor) in source.items()})
        paths = {name: keys for name, (keys, _) in source.items()} | {"epoch": ("epoch",)}
        write_torch(tmp_path / "m.pt", tensors, paths, {"epoch": 3})
        loaded = torch.load(tmp_path / "m.pt", weights_only=True, mmap=mmap)
        assert loaded.pop("epoch") == 3
        assert_same(dict(leaves(loaded)), dict(leaves(nested())))
        assert type(loaded["model"]["projector"]) is OrderedDict

    def test_strided_views_and_shared_storages_read_as_what_they_show(self, tmp_path):
        base = torch.arange(24.0).view(4, 6)
        tensors = {
            "whole": base,
            "row": base[2],
            "transposed": base.T,
            "strided": base[1:, 1::2],
            "tied": base,
            "expanded": base[:, :1].expand(4, 3),
        }
        torch.save(tensors, tmp_path / "m.pt")
        assert_same(read_torch(tmp_path / "m.pt").tensors, tensors)

    def test_parameters_and_tensor_subclasses_read_as_tensors(self, tmp_path):
        torch.save({"p": torch.nn.Parameter(torch.ones(3)), "t": torch.zeros(2)}, tmp_path / "m.pt")
        assert_same(read_torch(tmp_path / "m.pt").tensors, {"p": torch.ones(3), "t": torch.zeros(2)})

    def test_storages_are_aligned_for_mapping_in_place(self, tmp_path):
        tensors = {f"t{i}": torch.ones(i + 1) for i in range(20)}
        write_torch(tmp_path / "m.pt", lazy(tensors), {name: (name,) for name in tensors})
        mapped = torch.load(tmp_path / "m.pt", weights_only=True, mmap=True)
        base = {tensor.data_ptr() % 64 for tensor in mapped.values()}
        assert base == {0}

    def test_same_input_gives_the_same_bytes(self, tmp_path):
        tensors = lazy({"a": torch.randn(9, generator=torch.Generator().manual_seed(0)), "b": torch.ones(2, 2)})
        for directory in ("one", "two"):
            (tmp_path / directory).mkdir()
            write_torch(tmp_path / directory / "m.pt", tensors, {"a": ("model", "a"), "b": ("model", "b")})
        assert (tmp_path / "one" / "m.pt").read_bytes() == (tmp_path / "two" / "m.pt").read_bytes()


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_opening_reads_no_tensor(tmp_path, kind):
    """Bytes that change between opening and loading show when they were read."""
    path = tmp_path / f"m.{kind}"
    tensors = {"a": torch.full((1000,), 1.25), "b": torch.full((1000,), 2.5)}
    if kind == "pt":
        torch.save(tensors, path)
        opened = open_torch_checkpoint(path).tensors
    else:
        save_file(tensors, path)
        opened = read_safetensors(path)
    content = path.read_bytes()
    with open(path, "r+b") as file:  # in place: same size, same inode
        file.write(content.replace(tensors["b"].numpy().tobytes(), (-tensors["b"]).numpy().tobytes()))
    assert torch.equal(opened["a"].load(), tensors["a"])
    assert torch.equal(opened["b"].load(), -tensors["b"])


def test_loading_does_not_copy(tmp_path):
    save_file({"a": torch.ones(1000)}, tmp_path / "m.safetensors")
    tensor = read_safetensors(tmp_path / "m.safetensors")["a"]
    assert tensor.load().data_ptr() == tensor.load().data_ptr()
