"""Folders of safetensors: what is whole is read, what is not is named, and a pickle is never opened."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from safetensors.torch import load_file

from vgjax.errors import UserError
from vgjax.open import folders
from vgjax.open.folders import Folder

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, ml_dtypes.bfloat16)}


@pytest.fixture
def sharded(tmp_path):
    for i, (name, tensor) in enumerate(TENSORS.items()):
        save_file({name: tensor}, tmp_path / f"model-{i}.safetensors")
    places = {name: f"model-{i}.safetensors" for i, name in enumerate(TENSORS)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return tmp_path


def test_one_file_and_many_hold_the_same(sharded, tmp_path):
    one = tmp_path / "one"
    one.mkdir()
    save_file(TENSORS, one / "model.safetensors")
    for folder in (Folder(sharded), Folder(one)):
        assert folder.shapes == {"a": ((2, 3), "float32"), "b": ((4,), "bfloat16")}
        for name, tensor in TENSORS.items():
            assert folder.read(name).dtype == tensor.dtype
            np.testing.assert_array_equal(folder.read(name), tensor)


def test_a_variant_beside_the_whole_is_left_alone(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    save_file({"c": TENSORS["a"]}, tmp_path / "model.fp16.safetensors")
    assert set(Folder(tmp_path).shapes) == {"a", "b"}


def test_what_is_written_is_read_again_in_files_of_a_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "SHARD", 30)
    shapes = {name: (tensor.shape, tensor.dtype.name) for name, tensor in TENSORS.items()}
    folders.write(tmp_path, "model", {"_class_name": "X"}, iter(TENSORS.items()), shapes)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    ]  # fmt: skip
    folder = Folder(tmp_path)
    assert all(folder.read(name).tobytes() == tensor.tobytes() for name, tensor in TENSORS.items())


def test_types_of_several_widths_lie_where_torch_can_read_them(tmp_path):
    tensors = {"thin": np.ones(3, ml_dtypes.bfloat16), "none": np.float32(7).reshape(()), "wide": TENSORS["a"].T}
    shapes = {name: (tensor.shape, tensor.dtype.name) for name, tensor in tensors.items()}
    folders.write(tmp_path, "model", {"_class_name": "X"}, iter(tensors.items()), shapes)
    theirs = load_file(tmp_path / "model.safetensors")
    assert theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(theirs[name].float().numpy(), tensor.astype(np.float32))
        np.testing.assert_array_equal(Folder(tmp_path).read(name), tensor)


def test_a_link_may_leave_the_folder(sharded, tmp_path_factory):
    away = tmp_path_factory.mktemp("blobs") / "a"
    (sharded / "model-0.safetensors").rename(away)
    (sharded / "model-0.safetensors").symlink_to(away)
    np.testing.assert_array_equal(Folder(sharded).read("a"), TENSORS["a"])


def broken(folder, kind):
    first = folder / "model-0.safetensors"
    if kind == "missing shard":
        first.unlink()
    elif kind == "cut":
        first.write_bytes(first.read_bytes()[:-4])
    elif kind == "empty":
        first.write_bytes(b"")
    elif kind == "other tensor":
        save_file({"z": TENSORS["a"]}, first)
    elif kind == "index":
        (folder / "model.safetensors.index.json").write_text("{")
    elif kind == "list":
        (folder / "model.safetensors.index.json").write_text("[]")
    elif kind.startswith("file "):
        shown = {"weight_map": {"a": json.loads(kind.removeprefix("file "))}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(shown))
    elif kind == "places":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    else:
        for file in folder.iterdir():
            file.unlink()
        if kind == "pickle":
            (folder / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n")
        elif kind == "two":
            save_file(TENSORS, folder / "one.safetensors")
            save_file(TENSORS, folder / "two.safetensors")


@pytest.mark.parametrize(
    "kind,said",
    [
        ("missing shard", "lacks model-0.safetensors, which model.safetensors.index.json names"),
        ("cut", "model-0.safetensors is no whole safetensors file"),
        ("empty", "model-0.safetensors is no whole safetensors file"),
        ("other tensor", "model-0.safetensors lacks a, which the index says"),
        ("index", "index.json is no JSON"),
        *(
            (f"file {name}", "index.json: weight_map.a is .*no plain name")
            for name in ('"../x"', '"/x"', '".."', '""', "7")
        ),
        ("places", "weight_map is a list, not an object"),
        ("list", "holds a list, not an object"),
        ("pickle", "holds only pytorch_model.bin, and a pickle can run any code"),
        ("nothing", "holds no weights"),
        ("two", "holds one.safetensors, two.safetensors and no index"),
    ],
)
def test_what_is_not_whole_is_named(sharded, kind, said):
    broken(sharded, kind)
    with pytest.raises(UserError, match=said):
        Folder(sharded)
