"""`bpo rounds`: run, --status DIR, --jobs."""

from __future__ import annotations

from pathlib import Path

from bpo.config.io import load_config
from bpo.job.launch import Ranks, setup_logging
from bpo.job.signals import StopRequest
from bpo.job.terminal import printable

USAGE = """usage: bpo rounds --config FILE [--section.key VALUE ...]    run every stage that is not finished
       bpo rounds --config FILE [...] --jobs               print the jobs of these stages, for slurm/rounds.sh
       bpo rounds --status DIR                             print a table of the stages and metrics by round

Rounds of generation by the current policy, judging, selection and training (docs/rounds.md).
`bpo rounds --help` lists all options; those of rounds are rounds.*.
"""


def main(argv: list[str], stop: StopRequest | None = None) -> int:
    if not argv or argv == ["-h"]:
        print(USAGE)
        return 0 if argv else 2
    if argv[0] == "--status":
        from bpo.rounds.status import status_table

        if len(argv) != 2:
            raise ValueError("usage: bpo rounds --status DIR, the rounds.output_dir")
        print(printable(status_table(Path(argv[1]))))
        return 0
    setup_logging(Ranks())
    only_jobs = "--jobs" in argv
    about = (
        "Rounds of generation, judging, selection and training: runs every stage that is not finished. --jobs prints "
        "the jobs of these stages instead, for slurm/rounds.sh. `bpo rounds --status DIR` prints a table."
    )
    config = load_config([flag for flag in argv if flag != "--jobs"], "bpo rounds", about, ("model.path",))
    from bpo.rounds.run import prepare, run_rounds

    if not only_jobs:
        run_rounds(config, stop)
        print(f"all rounds are finished; `bpo rounds --status {config.rounds.output_dir}` shows them")
        return 0
    for stage in prepare(config):
        for position, (script, words) in enumerate(stage.kind.jobs):
            name = f"r{stage.round}-{stage.name}" + (f"-{words[0]}" if position else "")
            print("\t".join([name, script, *words, "--config", str(stage.config_file)]))
    return 0
