#!/usr/bin/env bash
# One process of a job, on its own host: installs vgjax for the accelerator it finds, sets the XLA flags of the chip and
# becomes `python -m MODULE ...`, so that SIGTERM reaches the training itself. The other launchers call this.
#
#   VGJAX_COORDINATOR=auto launch/process.sh vgjax.train --config configs/mmdit.py:2b --workdir /shared/2b
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
kind=$(accelerator)
install "$kind"
xla_flags "${kind:-cpu}"
export VGJAX_COORDINATOR=${VGJAX_COORDINATOR-auto}
exec python -m "$@"
