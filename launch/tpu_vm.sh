#!/usr/bin/env bash
# The same command on every host of a TPU slice (or of several, with --slices of the planner in mind):
#
#   TPU=my-pod ZONE=us-central2-b [PROJECT=...] launch/tpu_vm.sh vgjax.train --config configs/mmdit.py:2b --workdir /mnt/bucket/2b
#
# Copies the committed state of this repository to all hosts, installs it there, and starts one process a host; they
# find each other by themselves. SIGTERM goes on to all hosts, which save the same step and end; Ctrl-C ends the watching,
# not the job. The workdir must be a file system that all hosts share (a mounted bucket or Filestore). Where a host dies or
# the slice is preempted, the exit code is one of those that `vgjax/errors.py` calls restartable, and this script ends what
# is left of the job and starts all hosts again (RESTARTS, default 10).
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

failure="\$HOME/vgjax.failure" # on each host: the code with which its process failed, if it failed by itself
remote="rm -f $failure; export VGJAX_FAILURE=$failure; echo \$\$ >\$HOME/vgjax.pid; cd \$HOME/vgjax-$commit && exec bash launch/process.sh $(printf '%q ' "$@")"
# To the process of this job on each host, where it still runs: a process number may have gone to another program.
signal_all() { on_all "pid=\$(cat \$HOME/vgjax.pid); ! grep -qa '$1' /proc/\$pid/cmdline 2>/dev/null || kill -$2 \$pid"; }

# The code of the host that failed first: the others fail for its sake, with codes that would hide why.
first_failure() {
  on_all "[ ! -s $failure ] || echo failure \$(stat -c %.9Y $failure) \$(cat $failure)" 2>/dev/null |
    { grep -oE 'failure [0-9.]+ [0-9]+' || true; } | sort -k2 -n | head -n 1 | cut -d' ' -f3
}

told=
trap 'told=1; signal_all "$1" TERM || true' TERM
for ((left = ${RESTARTS:-10}; ; left--)); do
  on_all "$remote" &
  watching=$! code=0
  wait "$watching" || code=$?
  if [ -n "$told" ]; then # the signal had ended the waiting, not the job
    code=0
    wait "$watching" || code=$?
    exit "$code"
  fi
  [ "$code" -eq 0 ] || { first=$(first_failure) && code=${first:-$code}; }
  case $code in
    # Loader, hung, preempted (vgjax/errors.py); ended by a signal; 255: a host that is gone.
    5 | 6 | 75 | 134 | 135 | 137 | 139 | 143 | 255) ;;
    *) exit "$code" ;;
  esac
  [ "$left" -gt 0 ] || exit "$code"
  echo "ended with $code: starting all hosts again, $left times at most" >&2
  signal_all "$1" KILL || true
  sleep "${PAUSE:-30}"
  [ -z "$told" ] || exit "$code"
done
