#!/usr/bin/env bash
# Makes the environment (VGJAX_VENV, default .venv), installs the extras test and docs and runs the suite.
# Arguments go to pytest: launch/test.sh tests/flow -k shift
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
install "test,docs"
ruff check .
python -m pytest -n "${VGJAX_TEST_WORKERS:-2}" --dist worksteal "$@"
