"""The `bpo` command. Each subcommand imports only what it needs, so that help and `doctor` start quickly."""

from __future__ import annotations

import sys
from collections.abc import Callable

USAGE = """usage: bpo COMMAND [--config FILE] [--section.key VALUE ...]

Bootstrapped Preference Optimization of multimodal language models (arXiv 2403.08730).

commands:
  demo        run the complete pipeline on a synthetic world and write a report; minutes on two CPU cores
  check       `bpo check DATA`: validate all records and images of annotations or groups before a long job
  convert     `bpo convert IN OUT`: convert annotations or groups to another format, such as TRL's parquet
  bootstrap   create preference groups from annotations with weakened images and injected errors
  merge       merge the groups of a bootstrapping job with several shards (bootstrap.num_shards)
  train       preference training in one process; for several, use `deepspeed bpo/train.py`
  evaluate    measure hallucination with CHAIR and POPE
  export      export a checkpoint as a merged model directory or a PEFT adapter
  view        create an HTML page to inspect groups: images, diffs, provenance, token log-ratios
  score       per-token log-probs of a trained model and its reference, for `bpo view --scores`
  refs        `bpo refs inspect|verify|compact DIR`: maintain a store of reference log-probs
  plan        estimate memory and step time of a model on 1 to 1,024 GPUs
  bench       `bpo bench kernels|step|bootstrap`: kernels, a training step against TRL, batched bootstrapping
  doctor      check the environment and explain what each finding means for a run

`bpo COMMAND --help` lists the options of a command.
"""


def _demo(argv: list[str]) -> int:
    from bpo.tools.demo.run import main

    return main(argv)


def _check(argv: list[str]) -> int:
    from bpo.formats.check import main

    return main(argv)


def _convert(argv: list[str]) -> int:
    from bpo.formats.convert import main

    return main(argv)


def _bootstrap(argv: list[str]) -> int:
    from bpo.bootstrap.run import run_bootstrap
    from bpo.config.io import load_config
    from bpo.job.exits import Interrupted, JobError

    try:
        return COMMANDS[arguments[0]](arguments[1:])
    except (Interrupted, JobError) as reason:
        print(f"bpo {arguments[0]}: {reason}", file=sys.stderr)
        return reason.exit_code
    except ValueError as error:  # invalid user input: show the message without a traceback
        print(f"bpo {arguments[0]}: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
