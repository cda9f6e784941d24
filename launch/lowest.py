"""Every dependency of pyproject.toml at its lower bound, as constraints of pip: `LOWEST=1 launch/test.sh`."""

import re
import tomllib
from pathlib import Path


def constraints(project: dict) -> list[str]:
    """`name==version` for every requirement `name[extra]>=version,...`, extras included; pins are left as they are."""
    wanted = [*project["dependencies"], *(one for some in project["optional-dependencies"].values() for one in some)]
    found = (re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", requirement) for requirement in wanted)
    return sorted({f"{match[1]}=={match[2]}" for match in found if match})


if __name__ == "__main__":
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    print("\n".join(constraints(tomllib.loads(pyproject.read_text())["project"])))
