"""The laws of the house, executed."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "vgjax").rglob("*.py"))
# What a package, or one module of it, may import of the house besides itself: imports run one way.
GROUND = {"errors", "typing", "parallel.sharding"}
MAY_IMPORT = {
    "errors": set(),
    "typing": set(),
    "parallel.sharding": {"typing", "errors"},
    "parallel.distributed": {"errors", "typing"},
    "parallel.layouts": {"errors", "typing", "attention"},
    "nn": GROUND,
    "attention": GROUND,
    "models": GROUND | {"nn", "attention"},
    "flow": {"errors", "typing"},
    "losses": {"typing"},
    "metrics": {"errors", "typing", "data"},
    "data": {"errors", "typing"},
    "objectives": GROUND | {"flow", "losses", "metrics", "models", "nn"},
    "open.tables": {"errors", "typing"},
    "open.folders": {"errors", "typing", "data.storage"},
    "open": GROUND | {"training.checkpoint", "data", "parallel", "flow", "models", "nn", "objectives"},
    "pipeline": GROUND
    | {"data.storage", "experiment", "flow", "nn", "objectives", "open", "parallel", "training.checkpoint"},
    "planner": {"errors", "typing"},
    "training": GROUND | {"data.storage", "parallel.distributed", "losses"},
}
ENTRY = {"train", "sample", "encode", "evaluate", "plan", "convert"}
TOP = ENTRY | {"__init__", "errors", "experiment", "typing"}
FLAX = {"nn", "models", "open", "parallel.sharding", "training.state"}


def module(path: Path) -> str:
    """`training.state` of `vgjax/training/state.py`."""
    return ".".join(path.relative_to(ROOT / "vgjax").with_suffix("").parts)


def within(name: str, rooms: set[str]) -> bool:
    """Whether a module is one of these, or lies in one of these packages."""
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


MODULES = {module(path) for path in FILES}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(path: Path) -> set[str]:
    """The modules of the house that a file imports."""
    names = {name.removeprefix("vgjax.") for name in imports(path) if name.startswith("vgjax.")}
    return {name if name in MODULES else name.rpartition(".")[0] or name for name in names}


def offenders(wrong, files=FILES) -> list[str]:
    """What is wrong with which file."""
    return [f"{module(path)}: {said}" for path in files if (said := wrong(path))]


def test_the_top_holds_entry_points_and_what_all_share():
    assert {path.stem for path in (ROOT / "vgjax").glob("*.py")} == TOP


def test_imports_run_one_way():
    def wrong(path):
        name = module(path)
        if within(name, ENTRY | {"experiment"}) or path.name == "__init__.py":
            return ""
        rule = next((key for key in (name, name.split(".")[0]) if key in MAY_IMPORT), None)
        if rule is None:
            return "say in MAY_IMPORT what it may import"
        allowed = MAY_IMPORT[rule] | {rule}
        return ", ".join(sorted(used for used in own(path) if not within(used, allowed)))

    assert not offenders(wrong)


def test_nothing_imports_a_config_and_entry_points_are_imported_by_entry_points_alone():
    def wrong(path):
        names = {name for name in imports(path) if name.split(".")[0] == "configs"}
        return names | ({name for name in own(path) if name in ENTRY} if module(path) not in ENTRY else set())

    assert not offenders(wrong)


def test_flax_lives_where_parameters_live():
    def wrong(path):
        return {name for name in imports(path) if name.split(".")[0] == "flax"}

    assert not offenders(wrong, [path for path in FILES if not within(module(path), FLAX)])


def test_mesh_axes_are_named_only_in_layouts():
    def wrong(path):
        said = []
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""
            if name in ("P", "PartitionSpec"):
                said += [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            said += [node.value] if isinstance(node, ast.Constant) and node.value == "fsdp" else []
        return said

    assert not offenders(wrong, [path for path in FILES if path.name != "layouts.py"])


def test_no_deprecated_jax_and_no_global_configuration_outside_entry_points():
    def wrong(path):
        text = path.read_text()
        found = re.findall(r"experimental\.(?:pjit|shard_map)|random\.PRNGKey|^\s*with mesh:", text, re.M)
        # What every entry point does first.
        return found + (["jax.config.update"] if "jax.config.update" in text and path.stem != "program" else [])

    assert not offenders(wrong)


def test_nothing_asks_an_objective_a_model_or_a_family_for_its_class():
    """What a consumer wants to know, the noun says of itself."""

    def wrong(path):
        return re.findall(r"isinstance\([^)]*(?:Objective|DiT|VAE|Sampler|Pipeline|Family)\b[^)]*\)", path.read_text())

    assert not offenders(wrong)


def test_files_functions_and_lines_stay_small():
    def wrong(path):
        lines = path.read_text().splitlines()
        said = [f"{len(lines)} lines"] if len(lines) > 450 else []
        said += [f"line {i} is long" for i, line in enumerate(lines, 1) if len(line) > 120]
        functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
        return said + [f"{n.name} is long" for n in functions if n.end_lineno - n.lineno >= 60]

    assert not offenders(wrong)


def test_few_annotations_say_any():
    said = {module(path): len(re.findall(r"\bAny\b", path.read_text())) for path in FILES}
    assert sum(said.values()) < 80, sorted(said.items(), key=lambda item: -item[1])[:10]


def test_no_drawers():
    drawers = [path for path in ROOT.rglob("*.py") if path.stem.rstrip("s") in ("util", "helper", "misc", "common")]
    assert not [path for path in drawers if ".venv" not in path.parts]


def test_init_files_hold_a_docstring_at_most():
    def wrong(path):
        return [node for node in ast.parse(path.read_text()).body if not isinstance(node, ast.Expr)]

    assert not offenders(wrong, [path for path in FILES if path.name == "__init__.py"])


def test_every_file_opens_with_a_docstring():
    assert not offenders(lambda path: not ast.get_docstring(ast.parse(path.read_text())))


def test_reshapes_and_transposes_are_einops():
    rooms = {"nn", "models", "attention", "objectives", "flow"}

    def wrong(path):
        return re.findall(r"\.(?:reshape|transpose|swapaxes|moveaxis)\(", path.read_text())

    assert not offenders(wrong, [path for path in FILES if within(module(path), rooms)])


def test_one_place_multiplies_with_kernels():
    """What multiplies with a kernel by itself would be missed by adapters and quantisation."""

    def wrong(path):
        return re.findall(r"lora\.delta\(|kernel\.astype\(", path.read_text())

    free = {"nn.contract", "nn.causal", "nn.lora"}  # convolutions have no adapters; lora says what it adds
    files = [path for path in FILES if within(module(path), {"nn", "models"}) and module(path) not in free]
    assert not offenders(wrong, files)


MODELS = [path for path in FILES if within(module(path), {"models"}) and path.name != "__init__.py"]


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_every_model_has_a_test_and_shapes(path):
    assert (ROOT / "tests" / "models" / f"test_{path.stem}.py").exists()
    assert re.search(r"(Float|Int)\[Array", path.read_text())


def test_users_get_value_errors_from_the_door_and_nothing_else_exits():
    assert not offenders(lambda path: path.stem != "errors" and "sys.exit" in path.read_text())
