"""Open weights that go on learning: whole or by adapters, resumed, over devices, sampled; and what is refused."""

import json
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import open_models
import pytest
from conftest import ROOT, program
from safetensors.numpy import load_file

from vgjax import convert, evaluate, experiment
from vgjax.data import storage, video
from vgjax.data.embeddings import Embeddings
from vgjax.errors import USER, UserError
from vgjax.nn import lora
from vgjax.open import tables, texts, tune
from vgjax.open.families import family_of
from vgjax.open.store import Store, abstract, of_model
from vgjax.parallel import layouts, sharding
from vgjax.pipeline import trained
from vgjax.pipeline.frozen import prepared
from vgjax.pipeline.published import pipeline
from vgjax.training import checkpoint

CAPTIONS = ("a cat walks", "a red dog runs", "grass over snow", "a dog walks slowly")
FAMILIES = {"wan": open_models.wan, "hunyuan_video": open_models.hunyuan_video}
SHORT = (
    "--config.data.frames=5", "--config.data.size=(32,32)", "--config.data.fps=8.0", "--config.data.workers=0",
    "--config.train.batch=8", "--config.train.log_every=1", "--config.train.save_every=6", "--config.optim.lr=0.01",
    "--config.optim.warmup=1", "--config.optim.ema=0.5", "--config.precision=float32", "--config.layout.devices=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with four captioned clips, and a converted folder of each family."""
    home, random = tmp_path_factory.mktemp("tune"), np.random.default_rng(0)
    (home / "videos").mkdir()
    for i, caption in enumerate(CAPTIONS):
        clip = np.zeros((5, 32, 32, 3), np.uint8)
        clip[:, 4 * i : 4 * i + 12, 8:24] = random.integers(50, 255, 3)
        video.write_mp4(home / "videos" / f"{i}.mp4", clip, 8.0)
        (home / "videos" / f"{i}.txt").write_text(caption)
    for family, make in FAMILIES.items():
        make(home / family / "published")
        convert.convert(home / family / "published", home / family / "converted", None, None)
    return home


def train(home, name, steps, *flags, family="wan", **environment):
    """(what was printed, the losses) of a run in `home/family/name`."""
    given = f"--config.weights={home / family / 'converted'}", f"--config.data.path={home / 'videos'}"
    where = home / family / name
    config = f"configs/{family}.py:own"
    args = "--config", config, *SHORT, *given, "--workdir", where, f"--config.train.steps={steps}", *flags
    ran = program("train", *args, **environment)
    assert ran.returncode == 0, ran.stderr[-3000:]
    lines = (where / "metrics.jsonl").read_text().splitlines()
    return ran.stdout, [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def adapted(home):
    shows = "--config.train.image_every=12", "--config.train.evaluate_every=12", "--config.sample.steps=2"
    return train(home, "lora", 12, "--config.lora.rank=4", *shows)


def falls(losses):
    return np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])


def digest(printed):
    return re.search(r"state digest (\w{64})", printed)[1]


def test_the_whole_model_learns_and_a_resumed_run_is_the_same(home):
    straight, losses = train(home, "whole", 12)
    assert falls(losses)
    train(home, "halves", 6)
    resumed, again = train(home, "halves", 12)
    assert digest(resumed) == digest(straight) and again == losses


def test_adapters_learn_and_are_saved_alone(home, adapted):
    assert falls(adapted[1])
    tree, meta, _ = checkpoint.load(home / "wan" / "lora")
    leaves = tables.flat(tree["params"])
    assert {path.rsplit("/", 1)[1] for path in leaves} == {"a", "b"} and "velocity/blocks/block/qkv/a" in leaves
    assert sum(leaf.size for leaf in leaves.values()) < 8000 < 24608
    assert meta["config"]["weights"] == str(home / "wan" / "converted")


@pytest.mark.parametrize("family", ["hunyuan_video"])
def test_the_other_family_learns_too(home, family):
    _, losses = train(home, "lora", 12, "--config.lora.rank=4", family=family)
    assert falls(losses)


def test_adapters_on_eight_devices_that_encoded_the_clips_too_learn_as_on_one(home, adapted):
    flags = "--config.lora.rank=4", "--config.layout=usp", "--config.layout.devices=8"
    flags += (f"--config.latents={home / 'wan' / 'latents of eight'}",)
    _, losses = train(home, "spread", 12, *flags, JAX_NUM_CPU_DEVICES="8")
    np.testing.assert_allclose(losses, adapted[1], rtol=1e-4)


def test_a_run_is_sampled_by_one_process_or_two_and_differs_from_what_it_began_with(home, adapted):
    run, out = home / "wan" / "lora", home / "sampled"
    args = ["--prompt", CAPTIONS[0], "--frames", "5", "--size", "32x32", "--steps", "2"]
    ran = program("sample", "--checkpoint", run, *args, "--out", out)
    assert ran.returncode == 0 and "WanPipeline" in ran.stdout and (out / "000.mp4").is_file(), ran.stderr[-2000:]
    job = [sys.executable, "launch/local.py", "2", "vgjax.sample", "--checkpoint", run, *args, "--layout", "fsdp"]
    ran = subprocess.run([*map(str, job), "--out", str(home / "job")], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    # Of every frame, before the encoder makes more of what is one level of rounding.
    sheets = (video.read_image(home / name / "contact_sheet.png").astype(int) for name in ("sampled", "job"))
    assert np.abs(np.subtract(*sheets)).max() <= 1
    folder, tuned = tune.tuned(run)
    options = dict(frames=5, size=(32, 32), steps=2)
    ours, before = (pipeline(Store(folder, tuned=one))([CAPTIONS[0]], **options) for one in (tuned, None))
    assert (ours != before).mean() > 0.1


def test_a_merged_folder_samples_as_the_run_does_and_is_exported(home, adapted):
    for source, to, *more in (("lora", "merged"), ("merged", "exported", "--export")):
        ran = program("convert", "--from", home / "wan" / source, "--to", home / "wan" / to, *more)
        assert ran.returncode == 0, ran.stderr[-2000:]
    folder, tuned = tune.tuned(home / "wan" / "lora")
    options = dict(frames=5, size=(32, 32), steps=2)
    run = pipeline(Store(folder, tuned=tuned))([CAPTIONS[1]], **options)
    np.testing.assert_array_equal(pipeline(Store(home / "wan" / "merged"))([CAPTIONS[1]], **options), run)
    file = "transformer/diffusion_pytorch_model.safetensors"
    ours, theirs = (load_file(home / "wan" / name / file) for name in ("exported", "published"))
    changed = {name for name in theirs if not np.array_equal(ours[name], theirs[name])}
    assert ours.keys() == theirs.keys() and "blocks.0.attn1.to_q.weight" in changed
    assert all(re.search(r"(attn\d\.to_(q|k|v|out\.0)|ffn\..*)\.weight", name) for name in changed)
    assert not (home / "wan" / "exported" / texts.FOLDER).exists()


def test_captions_are_encoded_as_the_sampler_encodes_prompts(home, adapted):
    store = Store(home / "wan" / "converted")
    family = family_of(store)
    kept = Embeddings(home / "wan" / "latents")
    captions = [*CAPTIONS, ""]
    found, wanted = kept(captions), family.conditioner(store)(captions, keep=False)
    assert found.vec is None and wanted.vec is None
    np.testing.assert_array_equal(found.text["text"].mask, wanted.text["text"].mask)
    np.testing.assert_allclose(found.text["text"].c, wanted.text["text"].c, atol=1e-5)
    with pytest.raises(UserError, match="'a bird' is not among the encoded ones"):
        kept(["a bird"])


def measured(*args):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["evaluate", *map(str, args)])
    return stopped.value.code


def test_a_run_shows_itself_and_is_measured_beside_what_it_began_with(home, adapted, capsys):
    run, table = home / "wan" / "lora", {}
    assert (run / "images").is_dir() and any((run / "images").iterdir())
    (line,) = (run / "evaluations.jsonl").read_text().splitlines()
    shown = json.loads(line)
    clips = "--data", home / "videos", "--frames", 5, "--size", "32x32", "--fps", 8
    for name, args in {"tuned": [run], "published": [home / "wan" / "converted", *clips]}.items():
        out = home / f"{name}.json"
        assert measured("--checkpoint", *args, "--out", out) == 0
        table[name] = json.loads(out.read_text())
    assert table["tuned"]["step"] == 12 and table["published"]["step"] == 0
    assert np.isclose(shown["loss/loss"], table["tuned"]["loss"]["loss"], rtol=1e-3)
    assert set(table["tuned"]["loss"]) == {"loss", "loss/t0", "loss/t1", "loss/t2", "loss/t3"}
    assert measured("--checkpoint", run, "--frames", 9) == USER
    assert "--frames, --size and --fps have no effect" in capsys.readouterr().err
    assert measured("--checkpoint", home / "wan" / "converted") == USER
    assert "give --data, a folder of videos" in capsys.readouterr().err


def test_an_expert_learns_at_the_times_it_serves(home):
    open_models.wan(home / "experts" / "published", experts=2)
    convert.convert(home / "experts" / "published", home / "experts" / "converted", None, None)
    store = Store(home / "experts" / "converted")
    assert tune.served(store, "transformer") == (0.0, 0.125) and tune.served(store, "transformer_2") == (0.125, 1.0)


@pytest.fixture(scope="module")
def faint(home):
    """Of each family a folder in bf16, and a run whose adapters change its kernels by less than bf16 can add to 1."""
    made = {}
    for family in FAMILIES:
        folder, run = home / family / "narrow", home / family / "faint"
        convert.convert(home / family / "published", folder, "bfloat16", None)
        model, params, _ = Store(folder).read("transformer")
        boxed = abstract(model, of_model(model))
        own = sharding.unboxed(lora.born(boxed, 2, lora.TARGETS, jax.random.key(0)))
        own = jax.tree.map(lambda x: 2e-2 * jax.random.normal(jax.random.key(x.size), x.shape), own)
        config = {"objective": {"kind": "finetune"}, "weights": str(folder), "component": "transformer"}
        config["data"] = {"frames": 5, "size": [32, 32]}
        config["lora"] = {"rank": 2, "alpha": 4.0, "targets": list(lora.TARGETS)}
        with checkpoint.Checkpoints(run / checkpoint.SUBDIR) as kept:
            kept.save(1, {"ema": {"velocity": own}}, {"config": config}, wait=True)
        made[family] = model, params, lora.scaled(own, 2.0), *tune.tuned(run)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_narrow_parameters_act_where_their_sum_would_be_rounded_away(faint, family):
    model, params, own, folder, run = faint[family]
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    given = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), of_model(model).inputs(model))
    apply = jax.jit(model.apply)
    before, wanted = (apply({"params": one}, *given) for one in (wide, lora.merged(wide, own)))
    with Store(folder, tuned=run).variables("transformer") as (_, variables):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(variables["params"])} == {"bfloat16"}
        ours = apply(variables, *given)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(variables))
    change = np.std(wanted - before)
    assert change > 0
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-2 * change)


def test_a_merge_adds_in_fp32_and_rounds_once(faint, tmp_path):
    _, params, own, folder, run = faint["wan"]
    wanted = tables.flat(lora.merged(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), own))
    for dtype in (None, "float32"):
        tune.merge(folder, run, tmp_path / str(dtype), dtype)
        tree, *_ = checkpoint.load(tmp_path / str(dtype) / "transformer", items="ema")
        for path, leaf in tables.flat(tree["model"]).items():
            near = np.abs(np.asarray(leaf, np.float32) - wanted[path])
            assert leaf.dtype == (dtype or "bfloat16")
            assert (near <= (1e-6 if dtype else 2**-8) * np.abs(wanted[path]) + 1e-9).all(), (dtype, path)


def test_adapters_beside_a_model_give_its_videos_on_one_device_and_eight(faint):
    *_, folder, run = faint["wan"]
    options = dict(frames=5, size=(32, 32), steps=1, cfg=(1.0,))
    wheres = None, layouts.find("fsdp_tp", 8)
    one, eight = (pipeline(Store(folder, tuned=run, where=where))([CAPTIONS[0]], **options) for where in wheres)
    assert np.abs(one.astype(int) - eight.astype(int)).max() <= 1


def rewritten(step, to, old, new):
    """A copy of one step whose meta says something else, vouched for anew."""
    shutil.copytree(step, to)
    text = (to / "meta.json").read_text()
    assert old in text
    (to / "meta.json").write_text(text.replace(old, new))
    (to / storage.MANIFEST).unlink()
    storage.seal(to)


def test_a_component_that_is_a_path_is_refused(faint, home):
    rewritten(
        checkpoint.newest(faint["wan"][-1].run), home / "path", '"component": "transformer"', '"component": "../x"'
    )
    with pytest.raises(UserError, match="component of its config is '../x', which is no plain name"):
        tune.tuned(home / "path")


def config_of(home, *flags, arg="own"):
    from vgjax.training import program as start

    given = "--config", f"configs/wan.py:{arg}", f"--config.weights={home / 'wan' / 'converted'}"
    config, _, _ = start.read_config(["", *given, *flags], "", workdir=False)
    return experiment.resolve(config, home)


@pytest.mark.parametrize(
    "flags, arg, words",
    [
        (["--config.objective.family=hunyuan_video"], "own", "holds a WanPipeline: use the config of that family"),
        (["--config.component=transformer_3"], "own", "has no such model"),
        ([], "wan2.1-t2v-1.3b", "holds another model than config.model: dim 24 where config.model says 1536"),
        (["--config.weights=/nowhere"], "own", "/nowhere/model_index.json cannot be read"),
    ],
)
def test_a_folder_that_does_not_fit_the_config_is_refused(home, flags, arg, words):
    with pytest.raises(UserError, match=re.escape(words)):
        prepared(config_of(home, *flags, arg=arg), home)


def test_models_of_images_are_refused(home):
    open_models.wan(home / "image" / "published", image=True)
    convert.convert(home / "image" / "published", home / "image" / "converted", None, None)
    with pytest.raises(UserError, match="only text-to-video models can be finetuned"):
        prepared(config_of(home, f"--config.weights={home / 'image' / 'converted'}"), home)


def test_what_a_finetuning_cannot_do_is_said(home, adapted):
    step = checkpoint.newest(home / "wan" / "lora")
    rewritten(step, home / "moved", str(home / "wan" / "converted"), "/gone")
    with pytest.raises(UserError, match="finetuned from /gone, which is no converted folder"):
        tune.tuned(home / "moved")
    shutil.copytree(home / "wan" / "lora", home / "wan" / "other")
    (home / "wan" / "other" / "weights.sha256").write_text("of others")
    with pytest.raises(AssertionError, match="holds another transformer than the one whose adapters"):
        train(home, "other", 14, "--config.lora.rank=4")
    with pytest.raises(UserError, match="open models say plain velocities"):
        experiment.build(*prepared(config_of(home, "--config.objective.precondition=True"), home)[:2])
    built = experiment.build(*prepared(config_of(home, "--config.lora.rank=2"), home)[:2])
    assert trained.wanted(built)["velocity"]["blocks"]["block"]["qkv"]["a"].value.shape == (2, 3, 24, 2)
