#!/usr/bin/env bash
# Runs benchmarks/gpu.py on a GPU machine without a network, using the files packed by pack.py. From any directory:
#
#   benchmarks/offline/run.sh [arguments of benchmarks/gpu.py]     such as --seconds 540 --out /tmp/results
#   PYTHON=/path/to/python3 benchmarks/offline/run.sh ...          an interpreter with torch; default: python3
#   benchmarks/offline/run.sh -m pytest tests/gpu                  another module with its arguments
#
# Packages are installed into an environment in a temporary folder, which also includes the interpreter's packages and
# is removed at the end; the machine is not changed. Needs neither ensurepip nor git nor an installation.
set -euo pipefail

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
base=${PYTHON:-python3}
command -v "$base" >/dev/null || die "no $base; set the interpreter that has torch: PYTHON=/path/to/python3"
"$base" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' || die "$base has no torch; set an interpreter that has it: PYTHON=/path/to/python3"
shopt -s nullglob
wheels=("$root"/.wheels/*.whl)
quack=$root/.wheels-quack/quack.tar.xz
[[ ${#wheels[@]} -gt 0 || -e $quack ]] || die "neither .wheels/ nor .wheels-quack/ is here: run" \
    "benchmarks/offline/pack.py on a machine with a network and copy its folder into $root"

work=$(mktemp -d "${TMPDIR:-/tmp}/bpo-offline-XXXXXX")
trap 'rm -rf "$work"' EXIT
"$base" -m venv --without-pip "$work/venv"
python=$work/venv/bin/python
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# The interpreter may itself belong to an environment: its packages are added explicitly, after those installed below.
"$base" - >"$site/base.pth" <<'P'
import sys
print("import site;", "; ".join(f"site.addsitedir({p!r})" for p in sys.path if p.endswith(("site-packages", "dist-packages"))))
P
if [[ ${#wheels[@]} -gt 0 ]]; then
    pip=("$root"/.wheels/pip-*.whl)  # pip runs from its wheel: the interpreter need not have pip
    pip=("${pip[@]/%//pip}")
    [[ ${#pip[@]} -gt 0 ]] || pip=(-m pip)
    "$python" "${pip[@]}" --disable-pip-version-check install --quiet --no-index --no-deps --no-compile --no-cache-dir \
        --ignore-installed "${wheels[@]}" || die "the wheels cannot be installed; were they packed for another Python?"
fi

programs=$(dirname "$(command -v "$base")")  # for ninja, if it is not a system package
export PATH="$work/venv/bin:$programs:$PATH"
export PYTHONPATH="$root/checkout" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TORCH_EXTENSIONS_DIR="$work/extensions"

if [[ -e $quack ]]; then
    # QuACK 0.6.5 skips the analysis of library code, recognised by this folder name, and fails without it.
    unpacked=$work/quack/site-packages
    mkdir -p "$unpacked"
    "$python" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="tar")' "$quack" "$unpacked"
    printf 'import site; site.addsitedir(%s)\n' "'$unpacked/common'" >"$site/cute.pth"
    mapfile -t versions < <(printf '%s\n' "$unpacked"/quack-* | sort --version-sort --reverse)
    for version in "${versions[@]}"; do
        echo "$version" >"$site/quack.pth"
        "$python" -c 'import quack.linear_cross_entropy' 2>"$work/quack.log" && break
        echo "${version##*/} does not import here: $(tail -n 1 "$work/quack.log")" >&2
        rm "$site/quack.pth"
    done
fi

# Without git, the commit is the packed one.
if [[ -z ${BPO_COMMIT:-} ]] && ! git rev-parse HEAD >/dev/null 2>&1; then
    BPO_COMMIT=$("$python" benchmarks/offline/stamp.py read)
    export BPO_COMMIT
fi

[[ ${1:-} == -m ]] || set -- benchmarks/gpu.py "$@"
"$python" "$@"
