# shellcheck shell=bash
# Sourced by quickstart, test and .ci/run: `make_venv [EXTRA]` leaves a working .venv in the root of this checkout.

set -o pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$ROOT/.venv
NEEDED_GB=10 # torch with its GPU libraries takes 6; pip keeps its downloads beside them until it is done

info() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
fail() {
  info "$@"
  exit 1
}

make_venv() {
  local extra=${1-} stamp=$VENV/installed key
  key="$ROOT $(cksum <"$ROOT/pyproject.toml")"
  if new_enough "$VENV/bin/python"; then
    case $(cat "$stamp" 2>/dev/null) in "$key dev" | "$key $extra") return ;; esac
  fi
  usable || create_venv
  install_project "$extra"
  rm -f "$VENV/unfinished"
  printf '%s\n' "$key $extra" >"$stamp"
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# Is the .venv intact, and does its pip install into it? (Not so after the checkout was moved or copied.)
usable() {
  local pip_home
  [ ! -e "$VENV/unfinished" ] && new_enough "$VENV/bin/python" || return
  pip_home=$("$VENV/bin/pip" --version 2>/dev/null | sed 's|.* from \(.*\)/lib/.*|\1|')
  [ "$pip_home" -ef "$VENV" ]
}

create_venv() {
  local python free_gb
  python=$(find_python) || exit 1
  free_gb=$(df -Pk "$ROOT" | awk 'NR == 2 { print int($4 / 1048576) }')
  [ "$free_gb" -ge "$NEEDED_GB" ] ||
    fail "the disk of $ROOT has $free_gb GB free, but the installation needs $NEEDED_GB GB; make room and try again"
  info "making $VENV with $("$python" --version)"
  rm -rf "$VENV"
  mkdir "$VENV" && touch "$VENV/unfinished" && "$python" -m venv "$VENV" || fail "cannot make $VENV (see above)"
}

find_python() {
  local name without_venv=''
  for name in python3.14 python3.13 python3.12 python3.11 python3; do
    new_enough "$name" || continue
    if "$name" -c 'import ensurepip, venv' 2>/dev/null; then
      echo "$name"
      return
    fi
    without_venv=$name
  done
  [ -z "$without_venv" ] ||
    fail "$without_venv has no module venv or ensurepip; install them (on Debian and Ubuntu: apt install $without_venv-venv)"
  fail "Python 3.11 or newer is needed, but python3 is $(python3 --version 2>/dev/null || echo missing);" \
    "install one so that python3 or python3.11 is on the PATH"
}

install_project() {
  local log=$VENV/install.log
  info "installing fedddp and what it needs (2-3 minutes the first time; pip writes to $log)"
  (cd "$ROOT" && "$VENV/bin/python" -m pip install --disable-pip-version-check --editable ".${1:+[$1]}") 2>&1 |
    tee "$log" | show_progress >&2 || explain_failure "$log"
}

# One word per package that pip collects, so that minutes of download do not look like a hang.
show_progress() {
  local word name
  while read -r word name _; do
    case $word in
      Collecting) printf ' %s' "${name%%[<>=!~;[]*}" ;;
      Installing) printf '\n unpacking ...' ;;
    esac
  done
  echo
}

explain_failure() {
  if grep -q 'No space left on device' "$1"; then
    fail "the disk is full (${TMPDIR:-/tmp}, pip's cache or $VENV); make room, or point TMPDIR at a larger disk, and try again"
  elif grep -qE 'NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError' "$1"; then
    fail "pip cannot reach the package registry; check the network, or set HTTPS_PROXY or PIP_INDEX_URL, and try again"
  fi
  fail "pip failed: $(grep -i '^ *error' "$1" | tail -n 1) (all of it is in $1)"
}
