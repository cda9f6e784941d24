#!/usr/bin/env bash
# Makes the environment (VGJAX_VENV, default .venv), installs the extras test and docs and runs the suite.
# Arguments go to pytest: launch/test.sh tests/flow -k shift
# With LOWEST=1 every dependency is installed at its lower bound, in an environment of its own (.venv-lowest).
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
if [ -n "${LOWEST:-}" ]; then
  PIP_CONSTRAINT=$(mktemp)
  export PIP_CONSTRAINT VGJAX_VENV=${VGJAX_VENV:-.venv-lowest}
  "${PYTHON:-python3}" launch/lowest.py >"$PIP_CONSTRAINT"
fi
install "test,docs"
ruff check .
python -m pytest -n "${VGJAX_TEST_WORKERS:-2}" --dist worksteal --durations=25 "$@"
