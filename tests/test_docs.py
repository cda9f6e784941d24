"""The documentation site: it builds without a warning, every package has a page, and every example runs."""

import re
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def examples(page: Path) -> list[str]:
    """The Python blocks of a page, each behind as many empty lines as make its line numbers the page's."""
    text = page.read_text()
    blocks = re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)
    return ["\n" * text.count("\n", 0, block.start(1)) + block[1] for block in blocks]


def test_every_package_has_a_page_with_an_example():
    packages = {path.parent.name for path in (ROOT / "vgjax").glob("*/__init__.py")}
    assert {page.stem for page in PAGES if page.parent.name == "packages" and examples(page)} == packages


def test_the_site_builds_without_a_warning(tmp_path):
    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path))
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    assert (tmp_path / "packages" / "flow.html").exists()


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=lambda page: page.stem)
def test_the_examples_of_a_page_run_in_its_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    for example in examples(page):
        exec(compile(example, str(page), "exec"), names)
