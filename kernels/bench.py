"""The command `python kernels/bench.py`, implemented in `kernels/bench/command.py`.

Not in `kernels/bench/__main__.py`: users and scripts run it by this path.
"""

from bpo_kernels.bench.command import main

if __name__ == "__main__":
    raise SystemExit(main())
