# shellcheck shell=bash
# Sourced by the other launchers: `install EXTRA` makes the virtual environment and installs vgjax with that extra.
# A stamp of pyproject.toml makes the second start immediate.
install() {
  local extra=$1 venv=${VGJAX_VENV:-.venv} stamp
  command -v "${PYTHON:-python3}" >/dev/null || { echo "error: python3 is missing: install Python 3.11 or newer" >&2; exit 2; }
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $("${PYTHON:-python3}" --version) is too old: vgjax needs Python 3.11 or newer (set PYTHON=...)" >&2; exit 2; }
  stamp="$venv/.vgjax-${extra:-cpu}-$(sha256sum pyproject.toml | cut -c1-16)"
  [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
  # shellcheck disable=SC1091
  source "$venv/bin/activate"
  if [ ! -e "$stamp" ]; then
    echo "installing vgjax${extra:+[$extra]} into $venv"
    python -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}"
    touch "$stamp"
  fi
}

# The extra for the accelerator of this machine: cuda, tpu or nothing.
accelerator() {
  if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then echo cuda
  elif compgen -G "/dev/accel*" >/dev/null || compgen -G "/dev/vfio/[0-9]*" >/dev/null; then echo tpu
  fi
}

# On a CPU a step's temporaries are hundreds of megabytes that glibc gives back and asks for anew at every step, page by
# page: keeping them, in huge pages, makes the step a third faster (benchmarks/step.py). A value of your own is kept.
keep_memory() {
  export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000:glibc.malloc.top_pad=1000000000}
}

# Compiler flags of an accelerator (tpu, cuda), from the table in launch/xla_flags; what you set yourself wins.
xla_flags() {
  local kind variable value _reason
  while read -r kind variable value _reason; do
    [ "$kind" = "$1" ] || continue
    case $value in
      --*) export "$variable=$value${!variable:+ ${!variable}}" ;;
      *) export "$variable=${!variable-$value}" ;;
    esac
  done <launch/xla_flags
}
