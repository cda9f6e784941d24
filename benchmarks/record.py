"""What every result says of where it comes from, and where it goes."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Chip, cores, versions, commit and date."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    return {
        "chip": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "versions": {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}},
        "commit": head.stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def write(name: str, figures: dict[str, Any]) -> Path:
    """Writes `results/<name>.json`: the figures and the machine."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**figures, "machine": machine()}, indent=1) + "\n")
    print(path.read_text())
    return path
