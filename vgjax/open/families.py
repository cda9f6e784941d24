"""The families of open models: which file says how a published pipeline is sampled."""

from pathlib import Path
from types import ModuleType

from vgjax.errors import UserError
from vgjax.open import hunyuan_video, wan
from vgjax.open.store import INDEX, Store

FAMILIES = {"HunyuanVideoPipeline": hunyuan_video, "WanPipeline": wan, "WanImageToVideoPipeline": wan}

NAMED = {family.__name__.rpartition(".")[2]: family for family in FAMILIES.values()}  # as configs call them


def is_open(path: Path) -> bool:
    """Whether this is a converted folder."""
    return (path / INDEX).is_file()


def family_of(store: Store) -> ModuleType:
    """The file of the family that the folder's pipeline belongs to."""
    name = store.index.get("_class_name")
    if name not in FAMILIES:
        raise UserError(f"{store.folder / INDEX} is a {name}: known are {', '.join(FAMILIES)}")
    return FAMILIES[name]
