#!/usr/bin/env bash
# The same command on every host of a TPU slice (or of several, with --slices of the planner in mind):
#
#   TPU=my-pod ZONE=us-central2-b [PROJECT=...] launch/tpu_vm.sh vgjax.train --config configs/mmdit.py:2b --workdir /mnt/bucket/2b
#
# Copies the committed state of this repository to all hosts, installs it there, and starts one process a host; they
# find each other by themselves. Ctrl-C ends the watching, not the job. The workdir must be a file system that all hosts
# share (a mounted bucket or Filestore). Where a host dies or the slice is preempted, the exit code is one of those
# that `vgjax/errors.py` calls restartable, and this script starts all hosts again (RESTARTS, default 10).
set -euo pipefail
cd "$(dirname "$0")/.."
: "${TPU:?name of the TPU VM}" "${ZONE:?zone of the TPU VM}"
[ $# -ge 1 ] || { echo "error: no module given, as: TPU=my-pod ZONE=... launch/tpu_vm.sh vgjax.train --config ..." >&2; exit 2; }
[ -z "$(git status --porcelain)" ] || { echo "error: uncommitted changes would not travel: commit them first" >&2; exit 2; }
commit=$(git rev-parse --short HEAD)
on_all() { gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" ${PROJECT:+--project "$PROJECT"} --worker=all --command="$1"; }

git archive --format=tar.gz --prefix="vgjax-$commit/" --output="/tmp/vgjax-$commit.tar.gz" HEAD
gcloud compute tpus tpu-vm scp "/tmp/vgjax-$commit.tar.gz" "$TPU:/tmp/" --zone "$ZONE" ${PROJECT:+--project "$PROJECT"} --worker=all
on_all "tar -xzf /tmp/vgjax-$commit.tar.gz -C \$HOME"

remote="cd \$HOME/vgjax-$commit && exec bash launch/process.sh $(printf '%q ' "$@")"
for ((left = ${RESTARTS:-10}; ; left--)); do
  code=0
  on_all "$remote" || code=$?
  case $code in
    # Loader, hung, preempted (vgjax/errors.py); ended by a signal; 255: a host that is gone.
    5 | 6 | 75 | 134 | 135 | 137 | 139 | 143 | 255) ;;
    *) exit "$code" ;;
  esac
  [ "$left" -gt 0 ] || exit "$code"
  echo "ended with $code: starting all hosts again, $left times at most" >&2
  sleep 30
done
