#!/usr/bin/env bash
# Makes .venv and installs Lamina into it, editable, with what the tests and checks need.
# A second call returns at once. A broken, half-made or moved .venv is made anew.
#   PYTHON=python3.12       the interpreter to use (default: the first of 3.13 ... 3.10 that runs)
#   PIP_ARGS="..."          more arguments for pip install, e.g. an index of CPU builds
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

in_range='import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))'
venv_python=.venv/bin/python

# Where it stands is part of the stamp: a copied .venv would run the scripts of the place it came from.
stamp=.venv/.lamina-$({ cat pyproject.toml constraints.txt; pwd -P; } | cksum | tr -d ' ')

version_of() { "$1" -c 'import sys; print(sys.version)' 2>/dev/null </dev/null; }
is_python_asked_for() { [ -z "${PYTHON:-}" ] || [ "$(version_of "$PYTHON")" = "$(version_of "$venv_python")" ]; }
is_done() { [ -e "$stamp" ] && "$venv_python" -c '' 2>/dev/null && is_python_asked_for; }
is_done && exit 0

# Two calls at once (say `make test` beside `make demo`): the second waits, then finds the work done.
if command -v flock >/dev/null; then
    exec 9<"scripts/setup.sh"
    flock 9
    is_done && exit 0
fi

runs() { "$1" -c "$in_range" >/dev/null 2>&1 </dev/null; } # shims exist on PATH that cannot run

find_python() { # first one that can make a venv by itself, else first one that runs
    local candidate first=""
    for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3.10 python3; do
        if [ -z "$candidate" ] || ! runs "$candidate"; then continue; fi
        if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then echo "$candidate"; return; fi
        first=${first:-$candidate}
        if [ -n "${PYTHON:-}" ]; then break; fi
    done
    echo "$first"
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

install_venv_package() { # $1: python. Debian and Ubuntu ship ensurepip apart.
    command -v apt-get >/dev/null && as_root true 2>/dev/null || return 1
    local version
    version=$("$1" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    say "installing $version-venv"
    as_root apt-get update -q >&2 || true # one dead source must not stop the others
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qy "$version-venv" >&2 ||
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qy python3-venv >&2 || return 1
    "$1" -c 'import ensurepip, venv' 2>/dev/null
}

make_venv() { # $1: python
    rm -rf .venv
    if "$1" -c 'import ensurepip, venv' 2>/dev/null || install_venv_package "$1"; then
        "$1" -m venv .venv
    elif "$1" -m virtualenv --version >/dev/null 2>&1; then
        "$1" -m virtualenv -q .venv
    elif command -v uv >/dev/null; then
        uv venv -q --seed --python "$("$1" -c 'import sys; print(sys.executable)')" .venv
    else
        fail "$1 cannot make a virtual environment. Install python3-venv (apt-get install python3-venv) and run again."
    fi
}

mark=.venv/.installing # left behind only by a call that was killed while pip was writing

is_sound() { # the .venv that is there: whole, runs, has pip, was made here, is the python asked for
    [ ! -e "$mark" ] && runs "$venv_python" && "$venv_python" -m pip --version >/dev/null 2>&1 &&
        grep -qF "$(pwd -P)/.venv" .venv/bin/activate 2>/dev/null && is_python_asked_for
}

if [ -n "${PYTHON:-}" ] && ! runs "$PYTHON"; then
    fail "PYTHON=$PYTHON does not run or is not Python 3.10-3.13. Name another one, or leave PYTHON out."
fi
if ! is_sound; then
    python=$(find_python)
    [ -n "$python" ] || fail "no Python 3.10-3.13 found. Install one (apt-get install python3 python3-venv) or run with PYTHON=/path/to/python3."
    say "making .venv with $("$python" -V) ($python)"
    make_venv "$python"
fi

rm -f .venv/.lamina-*
touch "$mark"
say "installing (the first time takes minutes: torch is large)"
# shellcheck disable=SC2206  # PIP_ARGS is a list of words
extra=(${PIP_ARGS:-})
install() { "$venv_python" -m pip install --disable-pip-version-check --no-input ${extra[@]+"${extra[@]}"} "$@" >&2; }
if ! { install -q 'pip>=23' && install -c constraints.txt -e '.[dev]'; }; then
    rm -f "$mark" # pip undoes what it could not finish
    fail "pip could not install Lamina (its own lines above say why). Another package index can be given with PIP_ARGS."
fi
rm -f "$mark"
touch "$stamp" # last: a stamp means all of the above is done
say "done"
