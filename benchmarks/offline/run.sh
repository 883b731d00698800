#!/usr/bin/env bash
# On a GPU machine without a network: benchmarks/gpu.py with what pack.py has packed. From any directory:
#
#   benchmarks/offline/run.sh [arguments of benchmarks/gpu.py]     such as --seconds 540 --out /tmp/results
#   PYTHON=/path/to/python3 benchmarks/offline/run.sh ...          the interpreter that has torch; default: python3
#   benchmarks/offline/run.sh -m pytest tests/gpu                  another module with its arguments
#
# Packages go into an environment in a temporary folder, which sees those of the interpreter too and is removed at the
# end; the machine itself stays as it was. Neither pip's bootstrap (ensurepip) nor git nor an installation is needed.
set -euo pipefail

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
base=${PYTHON:-python3}
command -v "$base" >/dev/null || die "no $base; give the interpreter that has torch: PYTHON=/path/to/python3"
"$base" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' || die "$base has no torch; give the interpreter that has: PYTHON=/path/to/python3"
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
# The interpreter may be that of an environment itself: its packages are named, and come after those installed below.
"$base" - >"$site/base.pth" <<'P'
import sys
print("import site;", "; ".join(f"site.addsitedir({p!r})" for p in sys.path if p.endswith(("site-packages", "dist-packages"))))
P
if [[ ${#wheels[@]} -gt 0 ]]; then
    pip=("$root"/.wheels/pip-*.whl)  # a wheel of pip runs as it is: the interpreter need not have one
    pip=("${pip[@]/%//pip}")
    [[ ${#pip[@]} -gt 0 ]] || pip=(-m pip)
    "$python" "${pip[@]}" --disable-pip-version-check install --quiet --no-index --no-deps --no-compile --no-cache-dir \
        --ignore-installed "${wheels[@]}" || die "the wheels cannot be installed; were they packed for another Python?"
fi

programs=$(dirname "$(command -v "$base")")  # ninja, where it is no package of the system
export PATH="$work/venv/bin:$programs:$PATH"
export PYTHONPATH="$root/checkout" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TORCH_EXTENSIONS_DIR="$work/extensions"

if [[ -e $quack ]]; then
    # QuACK 0.6.5 takes code for a library's, which it need not look into, by this name in its path, and else fails.
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

# Without git the commit is the one that was packed.
if [[ -z ${BPO_COMMIT:-} ]] && ! git rev-parse HEAD >/dev/null 2>&1; then
    BPO_COMMIT=$("$python" benchmarks/offline/stamp.py read)
    export BPO_COMMIT
fi

[[ ${1:-} == -m ]] || set -- benchmarks/gpu.py "$@"
"$python" "$@"
