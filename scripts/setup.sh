# Sourced by the scripts beside it: finds a Python that runs and makes an environment from a lock.
#
# `setup_venv run|dev` leaves $root/.venv ready: what scripts/run.lock or scripts/dev.lock pins, and
# the project itself, editable. It is idempotent, survives being killed, and two at once take turns.
# The caller sets $root, the clone. POSIX sh.

oldest=3.12 # what the locks are resolved for ...
newer=3.15  # ... and the first Python that some locked package has no wheel for
venv=$root/.venv
chosen_by=PYTHON # the variable that names an interpreter

# Settings for another Python would reach into this one.
unset PYTHONHOME PYTHONPATH

say() { printf 'setup: %s\n' "$*" >&2; }

die() {
    say "$@"
    exit 1
}

# --- an interpreter -------------------------------------------------------------------------------

# Prints the interpreter's own path, or says why it does not do. A venv needs ensurepip or a pip to
# borrow (Debian ships both apart from Python); a free-threaded build finds no wheels.
check_python='
import importlib.util, sys, sysconfig
low, high = (tuple(map(int, bound.split("."))) for bound in sys.argv[1:])
if not low <= sys.version_info[:2] < high:
    sys.exit("it is Python " + sys.version.split()[0])
if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
    sys.exit("it is not a standard CPython build")
if not any(importlib.util.find_spec(module) for module in ("ensurepip", "pip")):
    sys.exit("it has neither ensurepip nor pip (on Debian: apt install python3-venv)")
print(sys.executable)
'

try_python() { # CANDIDATE OLDEST NEWER
    path=$("$1" -I -c "$check_python" "$2" "$3" </dev/null) && [ -x "$path" ] &&
        printf '%s\n' "$path"
}

# find_python CHOSEN OLDEST NEWER NAME... prints a Python, OLDEST <= version < NEWER: CHOSEN and no
# other if it is not empty, else the first that does of the NAMEs on the PATH, pyenv's and uv's.
find_python() {
    chosen=$1 low=$2 high=$3
    shift 3
    if [ -n "$chosen" ]; then
        if answer=$(try_python "$chosen" "$low" "$high" 2>&1); then
            printf '%s\n' "$answer"
            return
        fi
        answer=$(printf '%s\n' "$answer" | head -n 1)
        die "$chosen_by=$chosen does not do (wanted: Python $low or newer, before $high): $answer"
    fi
    # A name on the PATH may be a shim that only prints an error, so each one is run.
    for name in "$@"; do
        try_python "$name" "$low" "$high" 2>/dev/null && return
    done
    versions=${PYENV_ROOT:-${HOME:-}/.pyenv}/versions
    for version in $(newest_first "$versions"); do
        try_python "$versions/$version/bin/python" "$low" "$high" 2>/dev/null && return
    done
    if command -v uv >/dev/null; then
        name=$(managed_python ">=$low,<$high" "${1#python}") &&
            try_python "$name" "$low" "$high" 2>/dev/null && return
    fi
    die "no Python that runs, $low or newer and before $high, on the PATH, in pyenv or from uv:" \
        "install one, or name one with $chosen_by=/path/to/python3."
}

project_python() { find_python "${PYTHON:-}" "$oldest" "$newer" python3.13 python3.12 python3; }

newest_first() { (cd "$1" 2>/dev/null && printf '%s\n' *) | sort -t . -k 1,1nr -k 2,2nr -k 3,3nr; }

managed_python() ( # RANGE TO-INSTALL
    # uv alone would stop at the first broken shim on the PATH.
    export UV_PYTHON_PREFERENCE=only-managed UV_PYTHON_INSTALL_BIN=0
    uv python find --no-project --system "$1" 2>/dev/null && return
    say "no Python found; asking uv for $2"
    uv python install "$2" </dev/null >&2 && uv python find --no-project --system "$1"
)

# --- an environment -------------------------------------------------------------------------------

new_venv() { # FOLDER PYTHON
    rm -rf "$1"
    without=""
    "$2" -I -c 'import ensurepip' 2>/dev/null || without=--without-pip
    # shellcheck disable=SC2086  # empty must vanish
    "$2" -I -m venv $without "$1" >&2 || die "$2 could not make the environment $1 (see above)"
}

# pip_install FOLDER PYTHON ARGUMENT...: quiet unless it fails. Builds take their tools from the
# environment (build.lock), not from the network: only what is locked is ever run.
pip_install() {
    folder=$1 base=$2
    shift 2
    set -- install --no-input --no-build-isolation --disable-pip-version-check "$@"
    if [ -x "$folder/bin/pip" ]; then
        set -- "$folder/bin/python" -m pip "$@"
    else
        set -- "$base" -m pip --python "$folder/bin/python" "$@"
    fi
    PIP_USER=0 "$@" >"$folder/pip.log" 2>&1 </dev/null && return
    tail -n 20 "$folder/pip.log" >&2
    die "pip failed (its last words are above, all of them in $folder/pip.log). With the network" \
        "back or the space found, run the same command again: it starts clean."
}

# hold PYTHON: keeps the clone's set-up to this process until descriptor 9 is closed. The lock belongs
# to the open file, so it outlives the Python that takes it and ends with this shell, however it ends.
hold() {
    exec 9>>"$root/.venv.lock"
    "$1" -I -c '
import fcntl, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("setup: waiting for another set-up of this clone", file=sys.stderr)
    fcntl.flock(9, fcntl.LOCK_EX)
'
}

# --- the project's environment --------------------------------------------------------------------

# fingerprint PYTHON FILE...: a digest of the files, the interpreter and the clone's place.
fingerprint() {
    interpreter=$1
    shift
    "$interpreter" -I -S -c '
import hashlib, os, pathlib, sys
parts = [os.path.realpath(sys.base_prefix), sys.version, sys.argv[1:]]
parts += [pathlib.Path(name).read_bytes() for name in sys.argv[1:]]
print(hashlib.sha256(repr(parts).encode()).hexdigest())
' "$@"
}

packages_of() { fingerprint "$1" "$root"/scripts/*.lock; }
project_of() { fingerprint "$1" "$root/pyproject.toml"; }

# venv_lacks run|dev PYTHON: prints everything, packages, project or nothing. PYTHON may be empty:
# then the environment's own will do, whichever it was made from.
venv_lacks() {
    packages="" project="" level=""
    [ ! -f "$venv/ready" ] || read -r packages project level <"$venv/ready" || :
    now=$(packages_of "$venv/bin/python" 2>/dev/null) || now=broken
    wanted=$now
    [ -z "$2" ] || wanted=$(packages_of "$2")
    if [ "$packages" != "$now" ] || [ "$packages" != "$wanted" ]; then
        echo everything
    elif [ "$1" = dev ] && [ "$level" != dev ]; then
        echo packages
    elif [ "$project" != "$(project_of "$venv/bin/python")" ]; then
        echo project
    else
        echo nothing
    fi
}

setup_venv() { # run|dev
    chosen=""
    if [ -n "${PYTHON:-}" ]; then
        chosen=$(project_python) || exit 1
    fi
    [ "$(venv_lacks "$1" "$chosen")" = nothing ] && return
    base=$(project_python) || exit 1
    hold "$base"
    lacks=$(venv_lacks "$1" "$chosen") # again: another process may have done it meanwhile
    [ "$lacks" = nothing ] || fill_venv "$1" "$lacks" "$base"
    exec 9>&-
}

# fill_venv run|dev LACKS PYTHON: `ready` goes first and comes last, so a killed set-up is remade.
fill_venv() {
    level=$1
    [ "$2" != project ] || read -r _ _ level <"$venv/ready"
    started=$(date +%s)
    rm -f "$venv/ready"
    case $2 in
    everything)
        say "making .venv from $3 and scripts/$1.lock; the first time, this takes a few minutes"
        new_venv "$venv" "$3"
        pip_install "$venv" "$3" --require-hashes -r "$root/scripts/build.lock"
        ;;
    packages) say "adding scripts/$1.lock to .venv" ;;
    esac
    [ "$2" = project ] || pip_install "$venv" "$3" --require-hashes -r "$root/scripts/$1.lock"
    pip_install "$venv" "$3" --no-deps --editable "$root"
    printf '%s %s %s\n' "$(packages_of "$venv/bin/python")" "$(project_of "$venv/bin/python")" \
        "$level" >"$venv/ready.new"
    mv "$venv/ready.new" "$venv/ready"
    say ".venv is ready ($(($(date +%s) - started)) s)"
}
