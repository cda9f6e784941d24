"""ConfigDict to the things it names: the door where every user error of a configuration is caught.

Each section of a config is the keyword arguments of the thing it builds, `kind` names which, `size` a row of the
model's SIZES table; there is no twin config class. Keys and simple types are checked against the signature of the
callable, so an unknown key is refused with the list of known ones.
"""

import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vgjax.data import shapes, text
from vgjax.data.sources import Folder
from vgjax.errors import UserError, check_finite
from vgjax.flow.known import CHANNELS, Given
from vgjax.flow.path import check_seed
from vgjax.flow.time import TIMES, Shift
from vgjax.models import causal_vae, clip, crossdit, hunyuan_vae, llama, mmdit, t5, wan_vae
from vgjax.models.text import TextEncoder, TextStreams
from vgjax.objectives.finetune import FinetuneObjective, Lora
from vgjax.objectives.flow import FlowObjective
from vgjax.objectives.vae import VAEObjective
from vgjax.open import texts, tune
from vgjax.open.families import NAMED
from vgjax.open.store import of_model
from vgjax.parallel import distributed, layouts
from vgjax.training import optimizers
from vgjax.training.players import Player
from vgjax.typing import Conditioner, Config, Dtype, Json, Module, Objective

MODELS = {
    "causal_vae": (causal_vae.CausalVAE, causal_vae.SIZES),
    "hunyuan_vae": (hunyuan_vae.HunyuanVAE, hunyuan_vae.SIZES),
    "wan_vae": (wan_vae.WanVAE, wan_vae.SIZES),
    "mmdit": (mmdit.MMDiT, mmdit.SIZES),
    "crossdit": (crossdit.CrossDiT, crossdit.SIZES),
    "clip_text": (clip.CLIPText, clip.SIZES),
    "clip_vision": (clip.CLIPVision, clip.SIZES),
    "t5": (t5.T5Encoder, t5.SIZES),
    "llama": (llama.Llama, llama.SIZES),
}
TOKENIZERS = {"bytes": text.Bytes, "words": text.Words}


@dataclasses.dataclass(frozen=True)
class Data:
    """The `data` section: clips of `frames` frames of `size` (height, width) at `fps` (None: every frame) from `path`.

    `workers` processes (0: `threads` of this one) load; one that brings nothing for `timeout_s` seconds ends the run.
    A caption is dropped with probability `drop_caption`; more than `max_bad` of the files bad stops the run. `kind` is
    `folder`, or `shapes`: then a closed `world` is written to `path`, `count` clips to train on and `held_out` others.
    """

    kind: str
    path: str
    frames: int
    size: tuple[int, int]
    fps: float | int | None = None
    workers: int = 0
    threads: int = 2
    timeout_s: float = 300.0
    max_bad: float = 0.1
    drop_caption: float = 0.0
    world: str = "small"
    count: int = 1000
    held_out: int = 64

    def __post_init__(self) -> None:
        if self.kind not in ("folder", "shapes"):
            raise UserError(f"config.data.kind={self.kind!r} is unknown: use one of folder, shapes")
        if len(self.size) != 2 or not all(isinstance(side, int) for side in self.size):
            raise UserError(f"config.data.size={self.size} must be (height, width) in pixels")
        if self.kind == "shapes" and self.fps is None:
            raise UserError("config.data.fps=None: a rendered world has no rate of its own, give one")
        check_finite(**{"config.data.fps": self.fps, "config.data.timeout_s": self.timeout_s})


EVERY = {"seed", "precision", "objective", "model", "data", "optim", "train", "layout", "evaluate"}
SECTIONS = {
    "vae": EVERY,
    "flow": EVERY | {"tokenizer", "text", "time", "shift", "vae", "latents", "sample", "known"},
    "finetune": EVERY | {"weights", "component", "lora", "time", "shift", "latents", "sample"},
}
KINDS = {module: kind for kind, (module, _) in MODELS.items()}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a config describes, built: the objective with its modules, and what reads captions (None: nobody)."""

    config: ConfigDict
    objective: Objective
    conditioner: Conditioner | None

    @property
    def vae(self) -> Module:
        return self.objective.codec


def call(where: str, function: Callable[..., Any], section: Config | ConfigDict, **given: Any) -> Any:
    """`function(**section, **given)`, each key and simple type of the section checked against the signature."""
    known = {name: p for name, p in inspect.signature(function).parameters.items() if name not in ("parent", "name")}
    open_keys = [name for name in known if name not in given]
    for key, value in section.items():
        if key not in open_keys:
            raise UserError(f"{where}.{key} is unknown: known keys are {', '.join(sorted(open_keys))}")
        _check_type(f"{where}.{key}", value, known[key].annotation)
    missing = [name for name in open_keys if name not in section and known[name].default is inspect.Parameter.empty]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}")
    return function(**{key: tune.plain(value) for key, value in section.items()}, **given)


def choose(where: str, table: Config, section: Config | ConfigDict) -> tuple[Any, Json]:
    """(what `kind` names in the table, the rest of the section)."""
    rest = dict(section)
    kind = rest.pop("kind", None)
    if kind not in table:
        raise UserError(f"{where}.kind={kind!r} is unknown: use one of {', '.join(table)}")
    return table[kind], rest


def model(where: str, section: Config | ConfigDict, dtype: Dtype, **given: Any) -> Any:
    """A module from its SIZES row and overrides."""
    (module, sizes), rest = choose(where, MODELS, section)
    size = rest.pop("size", None)
    if size is not None and size not in sizes:
        raise UserError(f"{where}.size={size!r} is unknown: use one of {', '.join(sizes)}")
    return call(where, module, {**(sizes[size] if size else {}), **rest}, dtype=dtype, **given)


def build(config: ConfigDict, vae: ConfigDict | None = None) -> Experiment:
    """The experiment of a resolved config; `vae` is the config of the frozen VAE under a flow."""
    kind = sections(config)
    check_seed("config.seed", config.seed)
    data_of(config)
    dtype = compute_dtype(config.precision)
    rest = {key: value for key, value in config.objective.items() if key != "kind"}
    if kind == "vae":
        objective = call("config.objective", VAEObjective, rest, model=model("config.model", config.model, dtype))
        return Experiment(config, objective, None)
    frozen = model("config.model", vae.model, dtype)
    if kind == "finetune":
        made = _finetune(config, rest, frozen, dtype)
        named = Path(config.weights), NAMED[config.objective.family]
        return Experiment(config, made, tune.captions(*named, made.model, dtype))
    conditioner, encoder = text_of(config, dtype)
    of_model = {"channels": frozen.latent_channels, "text_dim": encoder.dim, "pooled_dim": encoder.pooled}
    attention = layouts.named(config.layout.kind).attention()
    fields = MODELS.get(config.model.get("kind"), MODELS["mmdit"])[0].__dataclass_fields__
    of_model = {name: width for name, width in of_model.items() if name in fields}  # not all take a pooled text
    known = call("config.known", Given, config.known) if "known" in config else None
    of_model |= {"conditions": CHANNELS} if known else {}
    velocity = model("config.model", {**of_model, **config.model}, dtype, attention=attention)
    given = dict(model=velocity, text=encoder, vae=frozen, known=known, **_times(config))
    return Experiment(config, call("config.objective", FlowObjective, rest, **given), conditioner)


def text_of(config: ConfigDict, dtype: Dtype) -> tuple[Conditioner, TextEncoder | TextStreams]:
    """(what reads captions, the module that learns to read on) of a flow."""
    kinds = {"learned": TextEncoder, "frozen": TextStreams}
    module, rest = choose("config.text", kinds, {"kind": "learned", **config.text})
    if module is TextEncoder:
        maker, of_tokenizer = choose("config.tokenizer", TOKENIZERS, config.tokenizer)
        tokenizer = call("config.tokenizer", maker, of_tokenizer)
        sizes = dict(vocab=tokenizer.vocab, hashes=tokenizer.hashes, dtype=dtype)
        return text.Learned(tokenizer), call("config.text", module, rest, **sizes)
    known = rest.pop("sha256", "")
    conditioner = texts.frozen(rest.pop("path", ""), rest.pop("encoders", ()), dtype, call)
    if known and known != conditioner.identity():
        raise UserError(
            f"config.text.path={config.text.path} holds other text encoders, or asks them otherwise, than those that "
            "the model learned from: put them back, or train anew"
        )
    return conditioner, call("config.text", module, rest, dtype=dtype)


def _times(config: ConfigDict) -> Json:
    law, rest = choose("config.time", TIMES, config.time)
    return dict(time=call("config.time", law, rest), shift=call("config.shift", Shift, config.shift))


def _finetune(config: ConfigDict, rest: Json, vae: Module, dtype: Dtype) -> FinetuneObjective:
    name = rest.pop("family", None)
    if name not in NAMED:
        raise UserError(f"config.objective.family={name!r} is unknown: use one of {', '.join(NAMED)}")
    velocity = model("config.model", config.model, dtype, attention=layouts.named(config.layout.kind).attention())
    given = dict(
        model=velocity,
        text=None,
        vae=vae,
        velocity_of=NAMED[name].velocity,
        inputs=of_model(velocity).inputs,
        lora=call("config.lora", Lora, config.lora) if config.lora.get("rank", 0) else None,
        **_times(config),
    )
    return call("config.objective", FinetuneObjective, rest, **given)


def compute_dtype(precision: str) -> Dtype:
    """The one compute-dtype policy: bf16 on accelerators, fp32 on CPU (whose bf16 matmul is slower), or as told."""
    table = {
        "auto": jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16,
        "float32": jnp.float32,
        "bfloat16": jnp.bfloat16,
    }
    if precision not in table:
        raise UserError(f"config.precision={precision!r} is unknown: use one of {', '.join(table)}")
    return table[precision]


def players(section: Config | ConfigDict, steps: int, names: Sequence[str]) -> tuple[tuple[Player, ...], int]:
    """(players of these names, micro-batches a step) of `config.optim`, whose `players` says what differs for one.

    For a player of another `kind` of optimizer only the options that all kinds share are taken over.
    """
    shared = {key: value for key, value in dict(section).items() if key not in ("players", "accumulate")}
    own = dict(section.get("players", {}))
    if unknown := sorted(set(own) - set(names)):
        raise UserError(f"config.optim.players.{unknown[0]} is nobody: the players are {', '.join(names)}")
    accumulate = section.get("accumulate", 1)
    if not isinstance(accumulate, int) or accumulate < 1:
        raise UserError(f"config.optim.accumulate={accumulate!r} must be a whole number of at least 1")
    return tuple(_player(name, shared, dict(own.get(name, {})), steps) for name in names), accumulate


def _player(name: str, shared: Config, own: Config, steps: int) -> Player:
    where = f"config.optim.players.{name}" if own else "config.optim"
    if "kind" in own and own["kind"] != shared.get("kind"):
        shared = {key: value for key, value in shared.items() if key in (*CADENCE, *RATE)}
    kind, rest = choose(where, optimizers.OPTIMIZERS, {**shared, **own})
    cadence = call(where, Player, {key: rest.pop(key) for key in CADENCE if key in rest}, name=name, optimizer=None)
    if not (updates := cadence.updates(steps)):
        raise UserError(f"{where}.starts={cadence.starts}: it never learns in config.train.steps={steps}; start before")
    of_rate = {key: rest.pop(key) for key in RATE if key in rest}
    if "schedule" in of_rate:
        of_rate["kind"] = of_rate.pop("schedule")
    rate = call(where, optimizers.schedule, of_rate, steps=updates)
    return dataclasses.replace(cadence, optimizer=call(where, kind, rest, rate=rate))


CADENCE, RATE = ("clip", "ema", "every", "starts"), ("lr", "schedule", "warmup", "final")


def data_of(config: ConfigDict) -> Data:
    """The `data` section, checked."""
    return call("config.data", Data, config.data)


def world_of(config: ConfigDict) -> shapes.World:
    """The closed world of a `shapes` config at the size it is trained on."""
    data = data_of(config)
    return shapes.get(data.world, size=tuple(data.size), frames=data.frames, fps=data.fps)


def source(config: ConfigDict, split: str = "train") -> Folder:
    """The videos of a split: the rendered world, written once under `data.path/split`, or the user's folder.

    All processes of a job call it together.
    """
    data = data_of(config)
    if data.kind == "shapes":
        world = world_of(config)
        folder = Path(data.path) / split
        with distributed.first():
            shapes.write(world, folder, data.count if split == "train" else data.held_out, split, config.seed)
        return Folder(folder)
    captioned = config.objective.kind != "vae"  # captions are for what is conditioned on them
    held_out = config.get("evaluate", {}).get("path", "")
    return Folder(Path(data.path if split == "train" else held_out or data.path), captioned)


def captions(config: ConfigDict, split: str) -> list[str]:
    """The captions of a split, in order."""
    return [caption for _, caption in source(config, split).records]


def resolve(config: ConfigDict, workdir: Path) -> ConfigDict:
    """The config with `{workdir}` filled in, the row of SIZES and the defaults of what it leaves out spelled out.

    So a checkpoint describes itself also after the table has changed.
    """

    def fill(value: object) -> object:
        if isinstance(value, Mapping):
            return {key: fill(inner) for key, inner in value.items()}
        if isinstance(value, str):
            return str(Path(value.replace("{workdir}", str(workdir))).resolve()) if "{workdir}" in value else value
        return value

    plain = fill(config.to_dict())
    section = plain.get("model", {})
    _, sizes = MODELS.get(section.get("kind"), (None, {}))
    if section.get("size") in sizes:
        plain["model"] = {**sizes[section.pop("size")], **section}
    for name, of_section in (("data", Data), ("layout", layouts.find), ("shift", Shift)):
        if name in plain:
            plain[name] = {**_defaults(of_section), **plain[name]}
    return ConfigDict(plain)


def _defaults(function: Callable[..., object]) -> Json:
    """What a section that leaves a key out has in its place: a default is a default for every reader."""
    known = inspect.signature(function).parameters.items()
    return {name: p.default for name, p in known if p.default is not inspect.Parameter.empty}


def difference(config: ConfigDict, defaults: ConfigDict) -> list[str]:
    """Lines `config.key = value (default: ...)` for every value that is not the file's default."""
    ours, theirs = _flat(config.to_dict()), _flat(defaults.to_dict())
    return [
        f"config.{key} = {ours.get(key)!r} (default: {theirs.get(key)!r})"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]


def sections(config: ConfigDict) -> str:
    """The objective's kind, after the sections were compared with those it needs."""
    kind = config.get("objective", {}).get("kind")
    if kind not in SECTIONS:
        raise UserError(f"config.objective.kind={kind!r} is unknown: use one of {', '.join(SECTIONS)}")
    known, optional = SECTIONS[kind], {"evaluate"} if kind == "finetune" else {"known"}
    if kind == "flow" and config.get("text", {}).get("kind", "learned") != "learned":
        known = known - {"tokenizer"}  # frozen encoders have their own
    for key in config:
        if key not in known:
            raise UserError(f"config.{key} is unknown: known sections are {', '.join(sorted(known))}")
    if missing := sorted(known - optional - set(config)):
        raise UserError(f"the config lacks {', '.join(missing)}: a {kind} config needs these sections")
    return kind


def _check_type(where: str, value: object, annotation: object) -> None:
    if value is None and isinstance(annotation, type | types.UnionType):
        if annotation is not type(None) and type(None) not in typing.get_args(annotation):
            raise UserError(f"{where}=None must be of type {getattr(annotation, '__name__', annotation)}")
    allowed = {int: (int,), float: (int, float), str: (str,), bool: (bool,)}.get(annotation)
    if allowed is None:
        return
    if not isinstance(value, allowed) or (isinstance(value, bool) and annotation is not bool):
        raise UserError(f"{where}={value!r} must be of type {annotation.__name__}, not {type(value).__name__}")


def _flat(tree: Config, prefix: str = "") -> Json:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.loads(json.dumps(value))
    return flat
