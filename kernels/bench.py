"""The command `python kernels/bench.py`; what it does is in `kernels/bench/command.py`.

Not `kernels/bench/__main__.py` alone: users and scripts start it by this path.
"""

from bpo_kernels.bench.command import main

if __name__ == "__main__":
    raise SystemExit(main())
