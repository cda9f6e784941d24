"""Published models and converted folders: which class is which of our modules, and its parameters on the devices."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vgjax.errors import UserError
from vgjax.models.clip import CLIPText, CLIPVision
from vgjax.models.crossdit import CrossDiT
from vgjax.models.hunyuan_vae import HunyuanVAE
from vgjax.models.llama import Llama
from vgjax.models.mmdit import MMDiT
from vgjax.models.t5 import T5Encoder
from vgjax.models.wan_vae import WanVAE
from vgjax.nn import lora
from vgjax.objectives.finetune import Lora
from vgjax.open import folders
from vgjax.open.published import clip, crossdit, hunyuan_vae, llama, mmdit, t5, wan_vae
from vgjax.parallel import sharding
from vgjax.parallel.layouts import Placement
from vgjax.training import checkpoint
from vgjax.typing import Config, Dtype, Json, PyTree

INDEX = "model_index.json"
# class of a config.json: (our module, the file of its names, stem of its safetensors)
READERS: dict[str, tuple[type[nn.Module], ModuleType, str]] = {
    "HunyuanVideoTransformer3DModel": (MMDiT, mmdit, "diffusion_pytorch_model"),
    "WanTransformer3DModel": (CrossDiT, crossdit, "diffusion_pytorch_model"),
    "AutoencoderKLHunyuanVideo": (HunyuanVAE, hunyuan_vae, "diffusion_pytorch_model"),
    "AutoencoderKLWan": (WanVAE, wan_vae, "diffusion_pytorch_model"),
    "LlamaModel": (Llama, llama, "model"),
    "CLIPTextModel": (CLIPText, clip, "model"),
    "CLIPVisionModel": (CLIPVision, clip, "model"),
    "T5EncoderModel": (T5Encoder, t5, "model"),
    "UMT5EncoderModel": (T5Encoder, t5, "model"),
}


def index_of(folder: Path) -> Json:
    """The model_index.json of a pipeline; a `UserError` where a key could not be a folder inside it."""
    found = folders.read_json(folder / INDEX)
    for name in found:
        folders.inside(name, folder / INDEX, "a key")
    return found


def parts_of(folder: Path) -> dict[str, str]:
    """The class of every part of a pipeline that its model_index.json names, by the part's folder."""
    held = {name: held for name, held in index_of(folder).items() if isinstance(held, list) and len(held) == 2}
    return {name: kind for name, (_, kind) in held.items() if kind}


def tokenized(folder: Path, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask by a tokenizer of transformers, from its files alone: padded and cut to `length`."""
    options = dict(padding="max_length", max_length=length, truncation=True, return_tensors="np")
    found = _tokens(folder, texts, **options)
    return found["input_ids"].astype(np.int32), found["attention_mask"].astype(bool)


def counted(folder: Path, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, whole."""
    return [len(ids) for ids in _tokens(folder, texts, verbose=False)["input_ids"]]


def _tokens(folder: Path, texts: Sequence[str], **options: Any) -> Any:
    import transformers

    try:
        # Of T5's vocabulary alone transformers does not tell whose it is.
        said = any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))
        alone = (folder / "spiece.model").is_file() and not said
        kind = transformers.T5Tokenizer if alone else transformers.AutoTokenizer
        tokenizer = kind.from_pretrained(folder, local_files_only=True)
        return tokenizer(list(texts), **options)
    except Exception as error:  # damaged files raise what they like there, a bare Exception too
        said = " ".join(str(error).split())
        raise UserError(f"{folder} holds no tokenizer that transformers can use ({said}): download it again") from error


def reader(config: Config, where: Path) -> tuple[type[nn.Module], ModuleType, str]:
    """The row of `READERS` for a config.json."""
    name = folders.class_of(config, where)
    if name not in READERS:
        raise UserError(f"{where} is a {name}: known are {', '.join(READERS)}")
    return READERS[name]


def of_model(module: nn.Module) -> ModuleType:
    """The file of a published module's names."""
    return next(file for known, file, _ in READERS.values() if known is type(module))


def fields(config: Config, where: Path) -> Json:
    """Our module's fields, of a config.json."""
    try:
        return reader(config, where)[1].published(config)
    except KeyError as error:
        raise UserError(f"{where / 'config.json'} lacks {error.args[0]!r}: download it again") from error


def abstract(module: nn.Module, of_model: ModuleType) -> PyTree:
    """The module's abstract parameters, in their boxes of names."""
    return jax.eval_shape(module.init, jax.random.key(0), *of_model.inputs(module))["params"]


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A run that went on training a component of a folder, and which of its weights to take: `ema` or `params`.

    run: its workdir or one step. sample: options of sampling that its config says, and the video it was trained on.
    """

    run: Path
    component: str
    lora: Lora | None = None
    weights: str = "ema"
    sample: Config = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Store:
    """A converted folder.

    `model` brings parameters onto `where` (layout, mesh; None: one device), and takes them away. What `tuned` trained
    stands in its place.
    """

    folder: Path
    dtype: Dtype = jnp.float32
    where: Placement | None = None
    tuned: Tuned | None = None

    @property
    def index(self) -> Json:
        return index_of(self.folder)

    @property
    def scheduler(self) -> Json:
        return folders.read_json(self.folder / "scheduler" / "scheduler_config.json")

    def meta(self, name: str) -> Json:
        """What a model's checkpoint says of it."""
        return checkpoint.meta(self.folder / name)

    def published(self, name: str) -> Json:
        """The config.json that a model was published with."""
        return self.meta(name)["published"]

    def has(self, name: str) -> bool:
        """Whether the folder has this model."""
        return (self.folder / name / checkpoint.SUBDIR).is_dir()

    def tokens(self, name: str, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask by a tokenizer of transformers, from its files alone: padded and cut to `length`."""
        return tokenized(self.folder / name, texts, length)

    def module(self, config: Config, name: str, **changed: int | bool) -> nn.Module:
        """Our module of a published config, with some fields changed."""
        cls, *_ = reader(config, self.folder / name)
        own = fields(config, self.folder / name) | changed
        if "attention" in cls.__dataclass_fields__ and self.where:
            own["attention"] = self.where.layout.attention()
        return cls(**own, dtype=self.dtype)

    @contextlib.contextmanager
    def model(self, name: str, **changed: int | bool) -> Iterator[tuple[nn.Module, PyTree, Json]]:
        """What `read` gives; the parameters are gone after it."""
        module, params, meta = self.read(name, **changed)
        try:
            yield module, params, meta
        finally:
            for leaf in jax.tree.leaves(params):
                leaf.delete()

    def read(self, name: str, **changed: int | bool) -> tuple[nn.Module, PyTree, Json]:
        """(module with some fields changed, its parameters, its checkpoint's meta).

        With fewer `blocks` than were published the first of them are taken. A model that was finetuned is read from
        its run; adapters are merged, and the kernels that they adapt are fp32.
        """
        module, params, own, meta = self.apart(name, **changed)
        return module, params if own is None else self.merged(params, own, jnp.float32), meta

    @contextlib.contextmanager
    def variables(self, name: str) -> Iterator[tuple[nn.Module, dict[str, PyTree]]]:
        """(module, its collections of parameters, which are gone afterwards): what it computes with.

        Adapters are merged where parameters and matmuls are fp32. Else they stay beside the kernels, as in training:
        a sum in bf16 would round away what is smaller than 2^-8 of a kernel's number.
        """
        module, params, own, _ = self.apart(name)
        held = {"params": params} | ({} if own is None else {"lora": own})
        wide = all(np.dtype(one) == np.float32 for one in (self.dtype, *(leaf.dtype for leaf in jax.tree.leaves(held))))
        if own is not None and wide:
            held = {"params": self.merged(params, own)}
        try:
            yield module, held
        finally:
            for leaf in jax.tree.leaves(held):
                leaf.delete()

    def merged(self, params: PyTree, own: PyTree, dtype: Dtype | None = None) -> PyTree:
        """The parameters with the products of the adapters `own` added in fp32; see `nn.lora.merged`."""
        placed = jax.tree.map(lambda leaf: leaf.sharding, params)
        return jax.jit(functools.partial(lora.merged, dtype=dtype), out_shardings=placed)(params, own)

    def apart(self, name: str, **changed: int | bool) -> tuple[nn.Module, PyTree, PyTree | None, Json]:
        """(module, its parameters, scaled adapters that a run learned beside them or None, its checkpoint's meta)."""
        step = checkpoint.newest(self.folder / name)
        meta = checkpoint.meta(step)
        module = self.module(meta["published"], name, **changed)
        boxed = abstract(module, reader(meta["published"], self.folder / name)[1])
        tuned = self.tuned if self.tuned and self.tuned.component == name else None
        if tuned is None:
            return module, self._read(step, "ema", boxed), None, meta
        if tuned.lora is None:
            return module, self._read(tuned.run, tuned.weights, boxed), None, meta
        born = functools.partial(lora.born, boxed, tuned.lora.rank, tuned.lora.targets)
        own = self._read(tuned.run, tuned.weights, jax.eval_shape(born, jax.random.key(0)))
        return module, self._read(step, "ema", boxed), lora.scaled(own, tuned.lora.scale), meta

    def _read(self, path: Path, item: str, boxed: PyTree) -> PyTree:
        """The leaves of a checkpoint's only model that `boxed` names, each in its place."""

        def place(_: Json, stored: PyTree) -> PyTree:
            ((kind, stored),) = stored[item].items()
            wanted = jax.tree.map(self._placed, boxed, _within(stored, boxed), is_leaf=_is_box)
            return {item: {kind: wanted}}

        tree, _, _ = checkpoint.load(path, items=(item,), place=place)
        (params,) = tree[item].values()
        return jax.tree.map(_first, params, sharding.unboxed(boxed))

    def _placed(self, box: sharding.Named, stored: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if self.where is None:
            return stored
        layout, mesh = self.where
        spec = layout.spec(box.names, stored.shape, mesh)
        return jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))


def _is_box(leaf: PyTree) -> bool:
    return isinstance(leaf, sharding.Named)


def _within(stored: PyTree, wanted: PyTree) -> PyTree:
    """What of a nested dict another one names."""
    if _is_box(wanted):
        return stored
    return {key: _within(stored[key], inner) for key, inner in wanted.items()}


def _first(leaf: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """The first layers of a leaf that has more."""
    if leaf.shape == wanted.shape:
        return leaf
    few = jax.jit(lambda x: x[: wanted.shape[0]], out_shardings=leaf.sharding)(leaf)
    leaf.delete()
    return few
