"""Open weights in and out: every bit comes back, nothing is overwritten, and what does not fit is said at once."""

import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import open_models
import pytest
import torch
from conftest import ROOT, program
from safetensors.torch import load_file, save_file

from vgjax import convert
from vgjax.errors import USER, UserError
from vgjax.open import tables
from vgjax.open.folders import write
from vgjax.open.published import crossdit
from vgjax.open.store import Store, abstract
from vgjax.parallel import sharding
from vgjax.training import checkpoint


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    return folder / "wan", open_models.wan(folder / "wan", experts=2)


@pytest.fixture
def damaged(published, tmp_path):
    """A copy to damage: (folder, the transformer's one file)."""
    folder = tmp_path / "damaged"
    shutil.copytree(published[0], folder)
    return folder, folder / "transformer" / "diffusion_pytorch_model.safetensors"


def run(*args, **environment):
    return program("convert", *args, **environment)


def test_a_pipeline_goes_in_and_comes_out_bit_by_bit(published, tmp_path):
    source, pipe = published
    went = run("--from", source, "--to", tmp_path / "converted")
    assert went.returncode == 0 and "transformer_2: " in went.stderr, went.stderr
    came = run("--from", tmp_path / "converted", "--to", tmp_path / "exported", "--export")
    assert came.returncode == 0, came.stderr
    for name in ("transformer", "transformer_2", "vae", "text_encoder"):
        theirs = getattr(pipe, name)
        (file,) = (tmp_path / "exported" / name).glob("*.safetensors")
        cls = type(theirs)
        config = (
            cls.config_class.from_pretrained(file.parent) if name == "text_encoder" else cls.load_config(file.parent)
        )
        again = cls(config) if name == "text_encoder" else cls.from_config(config)
        again.load_state_dict(load_file(file) | shared_of(load_file(file)))
        for key, tensor in theirs.state_dict().items():
            assert torch.equal(again.state_dict()[key], tensor), (name, key)
    index = json.loads((tmp_path / "exported" / "model_index.json").read_text())
    assert index == json.loads((source / "model_index.json").read_text())
    for file in (*source.glob("tokenizer/*"), *source.glob("scheduler/*")):
        assert (tmp_path / "exported" / file.relative_to(source)).read_bytes() == file.read_bytes()


def shared_of(tensors):
    """T5's embedding under its other name, which its files leave out."""
    return {"encoder.embed_tokens.weight": tensors["shared.weight"]} if "shared.weight" in tensors else {}


def test_parameters_may_be_made_smaller_and_spread(published, tmp_path):
    source, _ = published
    went = run(
        "--from", source, "--to", tmp_path / "c", "--dtype", "bfloat16", "--layout", "fsdp", JAX_NUM_CPU_DEVICES="8"
    )
    assert went.returncode == 0, went.stderr
    tree, meta, _ = checkpoint.load(tmp_path / "c" / "transformer", items="ema")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(tree)} == {"bfloat16"}
    assert meta["config"]["model"]["kind"] == "crossdit" and meta["published"]["_class_name"] == "WanTransformer3DModel"


def test_all_that_does_not_fit_is_said_at_once_and_nothing_is_written(damaged, tmp_path):
    folder, file = damaged
    tensors = load_file(file)
    tensors["proj_out.bias"] = torch.zeros(3)
    tensors["stray"] = torch.zeros(2)
    del tensors["blocks.1.attn2.to_k.weight"]
    save_file(tensors, file)
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps(config | {"z_dim": 5}))
    went = run("--from", folder, "--to", tmp_path / "c")
    assert went.returncode == USER and "Traceback" not in went.stderr
    for said in (
        "transformer: proj_out.bias has shape (3,)",
        "transformer: stray of shape (2,)",
        "transformer: blocks.1.attn2.to_k.weight is missing",
        "vae: post_quant_conv.weight has shape",
    ):
        assert said in went.stderr
    assert not (tmp_path / "c").exists()


def test_tensors_of_one_leaf_in_two_types_are_named_and_may_be_made_one(damaged, tmp_path):
    folder, file = damaged
    tensors = load_file(file)
    tensors["blocks.0.ffn.net.2.bias"] = tensors["blocks.0.ffn.net.2.bias"].to(torch.bfloat16)
    save_file(tensors, file)
    with pytest.raises(UserError, match="blocks.0.ffn.net.2.bias is bfloat16.*--dtype"):
        convert.convert(folder, tmp_path / "c", None, None)
    convert.convert(folder, tmp_path / "d", "float32", None)


@pytest.mark.parametrize(
    "damage,said",
    [
        (lambda folder, file: file.write_bytes(file.read_bytes()[:-8]), "no whole safetensors file"),
        (lambda folder, file: file.rename(file.with_suffix(".bin")), "a pickle can run any code"),
        (lambda folder, file: shutil.rmtree(folder / "vae"), "lacks the folder vae"),
        (lambda folder, file: (folder / "model_index.json").unlink(), "model_index.json cannot be read"),
        (lambda folder, file: (folder / "vae" / "config.json").write_text("{}"), "names no class"),
        (
            lambda folder, file: rewritten(folder, "transformer", _class_name="Other3DModel"),
            "is a Other3DModel: known are",
        ),
        (
            lambda folder, file: rewritten(folder, "transformer", qk_norm="layer_norm"),
            "qk_norm='layer_norm' is not supp",
        ),
        (lambda folder, file: rewritten(folder, "transformer", ffn_dim=None), "lacks 'ffn_dim'"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_in_a_sentence(damaged, tmp_path, damage, said):
    folder, file = damaged
    damage(folder, file)
    with pytest.raises(UserError, match=said):
        convert.convert(folder, tmp_path / "c", None, None)


def rewritten(folder, name, **changes):
    path = folder / name / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize("key", ["../other", "/tmp", "a/../..", ".."])
def test_a_pipeline_that_names_what_lies_outside_is_refused(damaged, tmp_path, key):
    folder, _ = damaged
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {key: ["transformers", "T5Tokenizer"]}))
    for act in (lambda: convert.convert(folder, tmp_path / "c", None, None), lambda: Store(folder).index):
        with pytest.raises(UserError, match=f"model_index.json: a key is '{key}', which is no plain name"):
            act()
    assert not (tmp_path / "c").exists()


def test_a_clone_is_converted_without_its_history(damaged, tmp_path):
    folder, _ = damaged
    for extra in (".git/lfs/blob", "samples/video.mp4", "tokenizer/.cache/x"):
        (folder / extra).parent.mkdir(parents=True)
        (folder / extra).write_bytes(b"many bytes")
    (folder / "extra.json").write_text("{}")
    convert.convert(folder, tmp_path / "c", None, None)
    names = {"model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "transformer_2", "vae"}
    assert {path.name for path in (tmp_path / "c").iterdir()} == names
    assert not (tmp_path / "c" / "tokenizer" / ".cache").exists()


def test_an_embedding_under_its_other_name_goes_in_and_comes_out_as_transformers_reads_it(damaged, published, tmp_path):
    folder, _ = damaged
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    save_file(tensors, file, {"format": "pt"})
    convert.convert(folder, tmp_path / "c", None, None)
    convert.export(tmp_path / "c", tmp_path / "e")
    theirs = published[1].text_encoder
    again = type(theirs).from_pretrained(tmp_path / "e" / "text_encoder")
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def test_a_vocabulary_alone_is_a_tokenizer_and_a_broken_one_is_told_before_anything_is_read(damaged, tmp_path):
    folder, _ = damaged
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="tokenizer holds no tokenizer that transformers can use"):
        convert.convert(folder, tmp_path / "c", None, None)
    assert not (tmp_path / "c").exists()
    pieces(folder / "tokenizer" / "spiece.model")
    convert.convert(folder, tmp_path / "c", None, None)
    ids, mask = Store(tmp_path / "c").tokens("tokenizer", ["a cat", ""], 8)
    assert mask.sum(axis=1).tolist() == [int(mask[0].sum()), 1] and mask[0].sum() > 2
    assert (ids[~mask] == 0).all() and ids[1, 0] == ids[0, mask[0].sum() - 1] == 1


def pieces(to):
    """A SentencePiece vocabulary as T5 has it: 0 pads, 1 ends."""
    import io

    import sentencepiece

    text, made = ["a cat walks on the grass", "a red dog runs over snow"] * 20, io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=made, vocab_size=20, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2,
    )  # fmt: skip
    to.write_bytes(made.getvalue())


PEAKS = """
import re, sys
from pathlib import Path
from vgjax import convert
to = Path(sys.argv[1])
convert.BATCH //= 8  # of a model that is as much smaller than those one converts
for source in map(Path, sys.argv[2:]):
    convert.convert(source, to / "in" / source.name, None, None)
    convert.export(to / "in" / source.name, to / "out" / source.name)
    print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def large(folder, layers, dim=1536):
    """A published transformer of bf16: (its bytes, those of its largest tensor)."""
    config = dict(
        _class_name="WanTransformer3DModel", num_attention_heads=dim // 128, attention_head_dim=128, ffn_dim=4 * dim,
        in_channels=16, out_channels=16, text_dim=dim, patch_size=(1, 2, 2), num_layers=layers,
    )  # fmt: skip
    model = crossdit.CrossDiT(**crossdit.published(config))
    entries = tables.entries(crossdit.weights(model), sharding.unboxed(abstract(model, crossdit)))
    tensors = ((entry.name, np.ones(entry.shape, jnp.bfloat16)) for entry in entries)
    shapes = {entry.name: (entry.shape, "bfloat16") for entry in entries}
    write(folder / "transformer", "diffusion_pytorch_model", config, tensors, shapes)
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    sizes = [2 * int(np.prod(entry.shape)) for entry in entries]
    return sum(sizes), max(sizes)


def test_memory_stays_at_a_models_size_and_two_tensors(tmp_path):
    """In a process of its own, beside what converting a model of next to nothing takes."""
    large(tmp_path / "small", 1, dim=128)
    size, largest = large(tmp_path / "large", 2)
    command = [sys.executable, "-c", PEAKS, *map(str, (tmp_path, tmp_path / "small", tmp_path / "large"))]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    idle, peak = (int(line) * 1024 for line in ran.stdout.split())
    assert peak - idle <= size + 2 * largest, f"{(peak - idle) / 1e6:.0f} MB for a model of {size / 1e6:.0f}"


def test_nothing_is_overwritten(published, tmp_path):
    (tmp_path / "mine").write_text("keep")
    went = run("--from", published[0], "--to", tmp_path)
    assert went.returncode == USER and "not an empty folder" in went.stderr
    assert (tmp_path / "mine").read_text() == "keep"
