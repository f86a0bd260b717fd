# shellcheck shell=bash
# What the scripts share: install what is missing, say so, do nothing twice.
#
# Sourced by them after `set -euo pipefail`. Offers:
#   setup demo|bench|test  the system's packages (apt-get, as root or through sudo) and a .venv in
#                       the checkout with the newest releases from PyPI and this project, editable;
#                       "bench" adds what draws plots, and the programs to compare with as far as
#                       they can be had; "test" adds the tools for checking. Returns at once when
#                       all is there.
#   $root $venv         the checkout and its virtual environment
#   say, die, as_root, can_be_root, apt_install

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv

# The same words and sort order everywhere; mkfs and losetup live in sbin; nothing of the caller's
# own Python set-up may leak into ours.
export LC_ALL=C.UTF-8
export PATH=$PATH:/usr/sbin:/sbin
unset PYTHONPATH PYTHONHOME PYTHONSTARTUP PYTHONUNBUFFERED VIRTUAL_ENV
export PIP_DEFAULT_TIMEOUT=${PIP_DEFAULT_TIMEOUT:-60} PIP_RETRIES=${PIP_RETRIES:-5}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore PIP_USER=0

say() { printf '== %s\n' "$*" >&2; }

die() {
  printf '\nerror: %s\n' "$1" >&2
  shift
  if (($#)); then printf '  %s\n' "$@" >&2; fi
  exit 1
}

# --- the system's packages ---------------------------------------------------------------------

can_be_root() {
  ((EUID == 0)) && return 0
  command -v sudo >/dev/null || return 1
  # Without a terminal nobody can type a password.
  sudo -n true 2>/dev/null || [[ -t 0 && -t 2 ]]
}

as_root() {
  if ((EUID == 0)); then "$@"; else sudo -- "$@"; fi
}

# apt_install PACKAGE...: 1 when apt-get cannot; never removes a package to make room for another.
# Its many lines are shown only then.
apt_install() {
  local options=(-y -q -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0) log
  log=$(mktemp)
  as_root apt-get update "${options[@]}" >"$log" 2>&1 ||
    say "apt-get update failed; trying with the lists that are there"
  if ! as_root env DEBIAN_FRONTEND=noninteractive apt-get install "${options[@]}" \
    --no-install-recommends --no-remove -- "$@" >>"$log" 2>&1; then
    cat -- "$log" >&2
    rm -f -- "$log"
    return 1
  fi
  rm -f -- "$log"
}

# Programs that the demo and the tests run. Prints the missing packages' names.
missing_tools() {
  command -v fusermount3 >/dev/null || echo fuse3
  command -v fio >/dev/null || echo fio
  command -v mkfs.ext4 >/dev/null || echo e2fsprogs
  { command -v mount && command -v losetup; } >/dev/null || echo mount
}

# Programs that only tests run; those that need them are skipped without (and fail in CI).
missing_test_tools() {
  command -v qemu-io >/dev/null || echo qemu-utils
  command -v strace >/dev/null || echo strace
}

# The programs that scripts/bench measures beside vsnapfs.
missing_peers() {
  command -v qemu-storage-daemon >/dev/null || echo qemu-system-common
  command -v qemu-img >/dev/null || echo qemu-utils
  command -v nbdkit >/dev/null || echo nbdkit
  command -v nbdfuse >/dev/null || echo libnbd-bin
}

# What building pyfuse3 from PyPI takes besides: it comes as source only.
missing_build_tools() {
  local name
  name=$(basename -- "$python")
  "$python" -c 'import ensurepip, venv' 2>/dev/null || echo "$name-venv"
  "$python" -c 'import os, sysconfig
raise SystemExit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
    echo "$name-dev"
  command -v gcc >/dev/null || echo gcc
  echo '#include <stdlib.h>' | gcc -E - >/dev/null 2>&1 || echo libc6-dev
  command -v pkg-config >/dev/null || echo pkg-config
  pkg-config --exists fuse3 2>/dev/null || echo libfuse3-dev
}

missing_anything() {
  missing_tools
  missing_build_tools
}

# list_missing FUNCTION: sets the caller's $missing to what FUNCTION prints, a line each.
list_missing() {
  local printed
  printed=$("$1") || die "what is missing could not be found out ($1)"
  missing=()
  [[ -z $printed ]] || mapfile -t missing <<<"$printed"
}

# need_packages FUNCTION: installs what FUNCTION prints, and looks again.
need_packages() {
  local missing
  list_missing "$1"
  ((${#missing[@]})) || return 0
  local command="apt-get install --no-install-recommends ${missing[*]}"
  if ! command -v apt-get >/dev/null; then
    die "this needs programs that are not installed" \
      "Their packages are called, in Debian's words: ${missing[*]}" \
      "Install them with this system's own package manager, then run this again."
  fi
  can_be_root || die "packages are missing, and installing them takes root. Run this, then try again:" \
    "sudo $command"
  say "installing Debian packages (may take a minute): ${missing[*]}"
  apt_install "${missing[@]}" || die "apt-get could not install: ${missing[*]} (its reason is above)"
  list_missing "$1"
  ((${#missing[@]} == 0)) || die "still missing after installing them: ${missing[*]}"
}

# want_packages FUNCTION: like need_packages, but what cannot be had is said and left out.
want_packages() {
  local missing package
  list_missing "$1"
  ((${#missing[@]})) || return 0
  if ! command -v apt-get >/dev/null || ! can_be_root; then
    say "going on without what these Debian packages hold: ${missing[*]}" && return 0
  fi
  say "installing Debian packages (may take a minute): ${missing[*]}"
  apt_install "${missing[@]}" && return 0
  # One that does not exist here must not keep the others away.
  for package in "${missing[@]}"; do
    apt_install "$package" 2>/dev/null || say "going on without $package: apt-get could not install it"
  done
}

# --- Python ------------------------------------------------------------------------------------

is_new_enough() {
  "$1" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null
}

# Sets $python. The system's own comes first: the headers that apt-get installs are for that one.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} /usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11; do
    if candidate=$(command -v -- "$candidate") && is_new_enough "$candidate"; then
      python=$candidate
      return
    fi
  done
  die "Python 3.11 or newer is needed (Debian 12 has it: apt-get install python3)" \
    "One in an unusual place can be named: PYTHON=/path/to/python3 $0"
}

# venv_stamp LEVEL: what a virtual environment was made for and from. Another place, another Python
# or other requirements make it a bad one; other settings of a tool in pyproject.toml do not.
venv_stamp() {
  printf '%s\n' "$1" "$venv"
  "$python" - "$root/pyproject.toml" <<'END'
import hashlib, sys, tomllib
with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)
wanted = repr([project[table] for table in ("build-system", "project", "dependency-groups")])
print(sys.version, sys.base_prefix, hashlib.sha256(wanted.encode()).hexdigest())
END
}

# Prints the prefix of the Python in $venv, if everything that vsnapfs imports is there.
venv_prefix() {
  "$venv/bin/python" -c 'import sys, click, numpy, pyfuse3, rich, trio, vsnapfs, xxhash
print(sys.prefix)'
}

# venv_is_good LEVEL: made for this level or for one that holds it and more; and it still runs.
venv_is_good() {
  local stamp level enough=("$1" test)
  [[ $1 != demo ]] || enough+=(bench)
  stamp=$(cat -- "$venv/.stamp" 2>/dev/null) || return 1
  for level in "${enough[@]}" ''; do
    [[ -n $level ]] || return 1
    [[ $stamp != "$(venv_stamp "$level")" ]] || break
  done
  [[ -x $venv/bin/vsnapfs && $(venv_prefix 2>/dev/null) == "$venv" ]]
}

# make_venv LEVEL: always from nothing, since half a one cannot be trusted. The stamp comes last.
make_venv() (
  # To begin from nothing would empty what somebody has made elsewhere.
  [[ ! -L $venv ]] || die "$venv is a link to $(readlink -- "$venv"), made for something else" \
    "What it leads to is left alone. Remove the link, then run this again."
  case $1 in
  demo) group=() ;;
  bench) group=(--group bench) ;;
  *) group=(--group dev) ;;
  esac
  say "making $venv with the newest releases from PyPI (a minute or two)"
  "$python" -m venv --clear -- "$venv" || die "no virtual environment could be made in $venv"
  cd -- "$root" || die "$root is gone"
  pip=("$venv/bin/python" -m pip --quiet install --progress-bar off --upgrade)
  # --group needs a pip newer than Debian's.
  if ! { "${pip[@]}" pip && "${pip[@]}" "${group[@]}" --editable .; } >"$venv/setup.log" 2>&1; then
    cat -- "$venv/setup.log" >&2
    die "pip could not install from PyPI what vsnapfs needs (its reason is above)" \
      "Run this again when the network is there."
  fi
  [[ $(venv_prefix) == "$venv" ]] || die "the packages are installed but do not work (see above)"
  venv_stamp "$1" >"$venv/.stamp"
)

setup() {
  local level=$1 lock
  find_python
  # Two scripts started at once: the second waits for the first one's work.
  exec {lock}<"$root"
  flock "$lock"
  if venv_is_good "$level"; then
    need_packages missing_tools
  else
    need_packages missing_anything
    make_venv "$level"
  fi
  [[ $level != bench ]] || want_packages missing_peers
  [[ $level != test ]] || want_packages missing_test_tools
  exec {lock}<&-
}
