# shellcheck shell=bash
# Sourced by run_eval_pipeline.sh and run_tests.sh: finds or makes the environment that they run in.
#
# `prepare core` or `prepare test`, called in the root of the repository, leaves in $python an interpreter
# that has what setup.cfg asks for: that of the active virtual or conda environment if it has it, else that
# of .venv, which is made on first use and brought up to date when a pin changes. All it says goes to stderr.
#
# `prepare lavis` makes .venv-lavis likewise, from constraints-lavis.txt: the second environment, in which the encoder
# `lavis` runs. `bash environment.sh lavis` does only that.
#
# .venv/plumbline.made        we made this environment, may remake it; somebody's own .venv is only added to
# .venv/plumbline.installed   what was installed; missing while an installation runs, and after one was killed

say() { echo "plumbline: $*" >&2; }
fail() { say "$@"; exit 1; }
have() { command -v "$1" > /dev/null 2>&1; }

prepare() {
    extra=$1 venv=.venv pins=constraints.txt
    local asked=(setup.cfg "$pins")
    if [ "$extra" = lavis ]; then  # never the active one: configurations name this one's Python
        venv=.venv-lavis pins=constraints-lavis.txt
        asked=("$pins")
    else
        find_active && return
    fi
    wanted="$(cat "${asked[@]}" | cksum) $(pwd -P)"
    if ! is_ready; then
        # The lock is the open file: it ends with the last process that has it, however that process ends.
        # A network file system locks only what is open for writing; nothing is ever written.
        ( lock; is_ready || build ) 9>> "$pins"
    fi
    python="$PWD/$venv/bin/python"
}

find_active() {
    local prefix missing
    for prefix in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
        if [ -z "$prefix" ] || [ "$prefix" -ef .venv ] || [ ! -x "$prefix/bin/python" ]; then continue; fi
        python="$prefix/bin/python"
        missing=$("$python" -m pipeline.support.requirements --missing "$extra" 2> /dev/null) ||
            missing="its Python cannot say what it has"
        if [ -z "$missing" ]; then return 0; fi
        # conda's base is active in every shell of many people, who do not mean it
        if [ "${CONDA_DEFAULT_ENV:-}" != base ]; then say "using $venv, not the active $prefix: $missing"; fi
    done
    return 1
}

is_ready() {
    local installed
    installed=$(cat "$venv/plumbline.installed" 2> /dev/null) || return 1
    if [ ! -x "$venv/bin/python" ]; then return 1; fi
    [ "$installed" = "test $wanted" ] || [ "$installed" = "$extra $wanted" ]
}

lock() {
    local any
    for any in python3 python "$venv/bin/python"; do
        if ! "$any" -c "import fcntl" 2> /dev/null; then continue; fi
        if "$any" -c "from fcntl import *; flock(9, LOCK_EX | LOCK_NB)" 2> /dev/null; then return; fi
        say "waiting: $venv is being prepared by another process"
        "$any" -c "from fcntl import *; flock(9, LOCK_EX)" || say "no file locks here: start one at a time"
        return
    done
}

build() {
    local is_whole=yes
    if [ ! -e "$venv/plumbline.installed" ] || [ ! -x "$venv/bin/python" ]; then is_whole=""; fi
    if [ -e "$venv/plumbline.made" ] && [ -z "$is_whole" ]; then
        say "remaking $venv: its preparation was cut short, or its Python is gone"
        rm -rf "$venv"
    fi
    [ -x "$venv/bin/python" ] || create
    install
}

create() {
    local base
    base=$(find_python) || exit 1
    say "making $venv with $base"
    if [ ! -e "$venv" ]; then
        mkdir "$venv"
        touch "$venv/plumbline.made"
    fi
    if have uv; then
        uv venv --quiet --allow-existing --python "$base" "$venv" >&2 || fail "uv could not make $venv"
    else
        "$base" -m venv "$venv" >&2 || fail "$base could not make $venv"
    fi
}

find_python() {
    local base path unusable=""
    local probe="import sys; print(sys.executable); sys.exit(sys.version_info < (3, 11))"
    for base in ${PLUMBLINE_PYTHON:+"$PLUMBLINE_PYTHON"} python3 python3.13 python3.12 python3.11 python; do
        if path=$("$base" -c "$probe" 2> /dev/null); then
            if have uv || "$path" -c "import ensurepip, venv" 2> /dev/null; then
                echo "$path"
                return
            fi
            unusable=$path
        fi
        if [ "$base" = "${PLUMBLINE_PYTHON:-}" ]; then break; fi
    done
    if [ -n "$unusable" ]; then
        fail "$unusable cannot make environments: install uv, or its venv (Debian: apt install python3-venv)"
    elif [ -n "${PLUMBLINE_PYTHON:-}" ]; then
        fail "PLUMBLINE_PYTHON=$PLUMBLINE_PYTHON is not a Python 3.11 or newer"
    elif have uv; then
        echo ">=3.11"  # uv fetches one
    else
        fail "Python 3.11 or newer was not found; if there is one, set PLUMBLINE_PYTHON to its path"
    fi
}

install() {
    local before status=0 installer=pip quiet=yes
    before=$(cat "$venv/plumbline.installed" 2> /dev/null) || true
    if have uv; then installer=uv; fi
    if [ -t 2 ]; then quiet=""; fi  # a person wants to see it move
    say "installing what $pins pins with $installer (the first time about 6 GB, some minutes)"
    if [ "$extra" = lavis ]; then
        set -- --no-deps -r "$pins"
    else
        "$venv/bin/python" -m pipeline.support.requirements "$extra" > "$venv/requirements.txt" ||
            fail "could not read setup.cfg"
        set -- -r "$venv/requirements.txt" -c "$pins"
    fi
    rm -f "$venv/plumbline.installed"
    "install_with_$installer" "$@" >&2 || status=$?
    if [ "$status" -eq 0 ]; then
        echo "$extra $wanted" > "$venv/plumbline.installed"
        return
    fi
    # an installer that gave up by itself changed nothing; one that was killed may have left half a package
    if [ -n "$before" ] && [ "$status" -lt 128 ]; then echo "$before" > "$venv/plumbline.installed"; fi
    fail "the installation failed; the same command tries again"
}

install_with_uv() { uv pip install --compile-bytecode ${quiet:+"--quiet"} --python "$venv/bin/python" "$@"; }

install_with_pip() { "$venv/bin/python" -m pip --disable-pip-version-check install ${quiet:+"--quiet"} "$@"; }

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    set -euo pipefail
    case "${1:-}" in
        core | test | lavis) ;;
        *) fail "bash environment.sh core, test or lavis   prepares an environment and prints its Python" ;;
    esac
    cd "$(dirname -- "$0")"
    prepare "$1"
    echo "$python"
fi
