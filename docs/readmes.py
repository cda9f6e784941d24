"""Puts README.md, benchmarks/README.md and the pictures they show into the site, so that pages link to their claims."""

from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]


def on_files(files, config):
    pictures = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("benchmarks/results/*.png")]
    pictures += [path.relative_to(ROOT).as_posix() for path in ROOT.glob("benchmarks/results/plans/**/*.png")]
    # In capitals the README would be the index of the site.
    pages = {"readme.md": "README.md", "benchmarks/README.md": "benchmarks/README.md"}
    for name, source in (pages | {picture: picture for picture in pictures}).items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files
