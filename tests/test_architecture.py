"""The laws of the house, executed."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "vgjax").rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
# What a package may import of the house, besides itself: imports run one way.
GROUND = {"errors", "typing", "sharding"}
MAY_IMPORT = {
    "errors": set(),
    "typing": set(),
    "sharding": {"typing"},
    "layouts": {"errors", "attention"},
    "nn": GROUND,
    "attention": GROUND,
    "models": GROUND | {"nn", "attention", "weights"},
    "flow": {"errors", "typing"},
    "losses": {"typing"},
    "metrics": {"errors", "typing", "data"},
    "data": {"errors", "video"},
    "video": {"errors"},
    "objectives": GROUND | {"flow", "losses", "metrics", "models", "nn"},
    "weights": {"errors", "typing"},
    "published": {"errors", "storage"},
    "families": GROUND
    | {"checkpoint", "data", "distributed", "flow", "models", "nn", "objectives", "published", "storage", "weights"},
    "chips": set(),
    "flops": {"chips", "errors"},
    "hlo": set(),
    "topology": {"chips", "errors"},
    "log": {"errors", "storage", "typing"},
    "storage": {"errors"},
    "checkpoint": {"distributed", "errors", "storage", "typing"},
    "distributed": {"errors"},
    "program": {"errors"},
    "optim": {"errors", "typing"},
    "rows": {"topology"},
    "state": GROUND,
    "step": GROUND | {"losses", "state"},
}
ENTRY = {"train", "sample", "encode", "evaluate", "plan", "convert"}
FLAX = {"nn", "models", "sharding", "state", "families"}


def package(path: Path) -> str:
    return path.relative_to(ROOT / "vgjax").parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_run_one_way(path):
    own = package(path)
    if own in ENTRY | {"experiment", "__init__"}:
        return
    used = {name.split(".")[1] for name in imports(path) if name.startswith("vgjax.")}
    assert own in MAY_IMPORT, f"say in MAY_IMPORT what {own} may import"
    assert used <= MAY_IMPORT[own] | {own}, f"{path} imports {used - MAY_IMPORT[own] - {own}}"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_nothing_imports_a_config_and_entry_points_are_not_imported_by_the_house(path):
    names = imports(path)
    assert not any(name.split(".")[0] == "configs" for name in names)
    if package(path) not in ENTRY:
        assert not any(name.startswith("vgjax.") and name.split(".")[1] in ENTRY for name in names)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_flax_lives_where_parameters_live(path):
    if package(path) in FLAX:
        return
    assert not any(name.split(".")[0] == "flax" for name in imports(path) if not name.startswith("flax.serialization"))


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_mesh_axes_are_named_only_in_layouts(path):
    if path.name == "layouts.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        name = getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""
        if name in ("P", "PartitionSpec"):
            assert not any(isinstance(arg, ast.Constant) and isinstance(arg.value, str) for arg in node.args)
        assert not (isinstance(node, ast.Constant) and node.value == "fsdp")


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_deprecated_jax_and_no_global_configuration_outside_entry_points(path):
    text = path.read_text()
    assert not re.search(r"experimental\.(pjit|shard_map)|random\.PRNGKey|^\s*with mesh:", text, re.M)
    if package(path) != "program":  # what every entry point does first
        assert "jax.config.update" not in text


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_functions_and_lines_stay_small(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 450
    assert max(map(len, lines), default=0) <= 120
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"


def test_no_drawers():
    drawers = [path for path in ROOT.rglob("*.py") if path.stem.rstrip("s") in ("util", "helper", "misc", "common")]
    assert not [path for path in drawers if ".venv" not in path.parts]


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=lambda p: p.parent.name)
def test_init_files_hold_a_docstring_at_most(path):
    assert all(isinstance(node, ast.Expr) for node in ast.parse(path.read_text()).body)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_file_opens_with_a_docstring(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_reshapes_and_transposes_are_einops(path):
    if package(path) in ("nn", "models", "attention", "objectives", "flow"):
        assert not re.search(r"\.(reshape|transpose|swapaxes|moveaxis)\(", path.read_text())


MODELS = [path for path in FILES if package(path) == "models" and path.name != "__init__.py"]


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_every_model_has_a_test_a_config_and_shapes(path):
    assert (ROOT / "tests" / "models" / f"test_{path.stem}.py").exists()
    assert re.search(r"(Float|Int)\[Array", path.read_text())
    configs = "".join(config.read_text() for config in (ROOT / "configs").glob("*.py"))
    assert path.stem in configs, f"no config builds {path.stem}"


def test_users_get_value_errors_from_the_door_and_nothing_else_exits():
    for path in FILES:
        if path.name != "errors.py":
            assert "sys.exit" not in path.read_text(), f"{path} exits past the door"
