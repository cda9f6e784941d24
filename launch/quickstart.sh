#!/usr/bin/env bash
# From nothing to sampled videos: installs vgjax (cpu, cuda or tpu, by what it finds), renders a small world to H.264
# files, trains the VAE and the MM-DiT on them, samples and measures. Interrupted and started again, it continues.
#
#   launch/quickstart.sh [WORKDIR]     default runs/quickstart; VGJAX_CONFIG=configs/shapes.py for the full world
set -euo pipefail
cd "$(dirname "$0")/.."
WORKDIR=$(realpath -m "${1:-runs/quickstart}")
CONFIG=${VGJAX_CONFIG:-configs/quickstart.py}
PROMPTS=${CONFIG%.py}.txt
[ -f "$PROMPTS" ] || { echo "error: $PROMPTS, the prompts to sample for $CONFIG, is missing: write one a line" >&2; exit 2; }
BEGAN=$SECONDS
source launch/environment.sh
install "$(accelerator)"
[ -n "$(accelerator)" ] || keep_memory

# A stop by the scheduler (exit code 75: all is saved) ends the script with the same code: start it again to continue.
# SIGTERM and Ctrl-C are passed on, so that the training saves first.
run() {
  local child code=0
  echo "+ python -m $*"
  python -m "$@" &
  child=$!
  trap 'kill -TERM $child 2>/dev/null' TERM INT
  wait $child || code=$?
  while kill -0 $child 2>/dev/null; do code=0; wait $child || code=$?; done
  trap - TERM INT
  [ $code = 0 ] || exit $code
}
run vgjax.train --config "$CONFIG:vae" --workdir "$WORKDIR/vae"
run vgjax.train --config "$CONFIG:dit" --workdir "$WORKDIR/dit"
run vgjax.sample --checkpoint "$WORKDIR/dit" --prompts "$PROMPTS" --out "$WORKDIR/samples"
run vgjax.evaluate --checkpoint "$WORKDIR/dit"
cat <<TXT

done in $(( (SECONDS - BEGAN) / 60 )) min $(( (SECONDS - BEGAN) % 60 )) s
videos         $WORKDIR/samples/*.mp4
contact sheet  $WORKDIR/samples/contact_sheet.png
scores         $WORKDIR/dit/evaluation.json
TXT
