"""The `bpo` command. Each subcommand imports only what it needs, so that help and `doctor` start quickly.

Options are read before anything that imports torch, so that a mistake in them is reported at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bpo.bootstrap.measure.hardness import ObjectTruth
    from bpo.config.training import Config

USAGE = """usage: bpo COMMAND [--config FILE] [--section.key VALUE ...]

Bootstrapped Preference Optimization of multimodal language models (arXiv 2403.08730).

commands:
  demo        run the complete pipeline on a synthetic world and write a report; minutes on two CPU cores
  check       `bpo check DATA`: validate all records and images of annotations or groups before a long job
  convert     `bpo convert IN OUT`: convert annotations or groups to another format, such as TRL's parquet
  bootstrap   create preference groups from annotations with weakened images and injected errors
  merge       merge the groups of a bootstrapping job with several shards; --partial: what is finished so far
  measure     `bpo measure GROUPS`: what rejected answers give away without the image, and whether the sample is fair
  rank        score candidate answers with a judge: `bpo rank --config FILE`
  select      select preference pairs among scored candidates
  train       preference training in one process; for several, use `deepspeed bpo/train.py`
  rounds      generate, judge, select and train, round after round; `--status DIR` shows where it is
  evaluate    measure hallucination with a suite of benchmarks; --compare A B: differences of two results
  judge       judge answers to MMHal-Bench, MM-Vet and others with a language model on a server
  export      export a checkpoint as a merged model directory or a PEFT adapter
  view        create an HTML page to inspect groups: images, diffs, provenance, token log-ratios
  score       per-token log-probs of a trained model and its reference, for `bpo view --scores`
  refs        `bpo refs inspect|verify|compact DIR`, `bpo refs follow RUN_DIR`: stores of reference log-probs
  plan        estimate memory and step time of a model on 1 to 1,024 GPUs
  bench       `bpo bench kernels|step|bootstrap`: kernels, a training step against TRL, batched bootstrapping
  doctor      check the environment and explain what each finding means for a run

`bpo COMMAND --help` lists the options of a command.
"""


def _demo(argv: list[str]) -> int:
    from bpo.tools.demo.run import main

    return main(argv)


def _check(argv: list[str]) -> int:
    from bpo.bootstrap.measure.quick import QuickMeasures
    from bpo.formats.check import main

    return main(argv, QuickMeasures)


def _convert(argv: list[str]) -> int:
    from bpo.formats.convert import main

    return main(argv)


def _bootstrap(argv: list[str]) -> int:
    from bpo.job.signals import StopRequest

    with StopRequest() as stop:  # before the imports, which take seconds
        from bpo.config.io import load_config
        from bpo.job.launch import ranks_from_environment, setup_logging

        setup_logging(ranks_from_environment())
        about = "Create preference groups from annotations."
        config = load_config(argv, prog="bpo bootstrap", description=about, reads=("data.annotations",))
        from bpo.bootstrap.run import run_bootstrap

        run_bootstrap(config, stop=stop, truth=_object_truth(config))
    return 0


def _merge(argv: list[str]) -> int:
    from bpo.config.io import load_config
    from bpo.job.launch import Ranks, setup_logging
    from bpo.job.terminal import printable

    setup_logging(Ranks())
    about = "Merge the results of all shards; with --partial, those that are finished so far."
    config = load_config([flag for flag in argv if flag != "--partial"], prog="bpo merge", description=about)
    from bpo.bootstrap.job.partial import describe
    from bpo.bootstrap.run import run_merge

    summary = run_merge(config, partial="--partial" in argv, truth=_object_truth(config))
    print(f"{summary.num_groups} groups of {summary.num_annotations} annotations: {summary.groups_path}")
    for line in describe(summary) if summary.partial else ():
        print(printable(line))
    return 0


def _object_truth(config: Config) -> ObjectTruth | None:
    """Objects in the images by `evaluation.chair_instances`, if it is set."""
    options = config.evaluation
    if not options.chair_instances:
        return None
    from bpo.bootstrap.measure.hardness import ObjectTruth
    from bpo.evaluation.files import read_coco

    captions, synonyms = (Path(name) if name else None for name in (options.chair_captions, options.synonyms))
    coco = read_coco(Path(options.chair_instances), captions, synonyms)
    present = {file: coco.present_of_image[image_id] for image_id, file in coco.file_of_image.items()}
    return ObjectTruth(present, coco.lexicon)


def _measure(argv: list[str]) -> int:
    from bpo.job.signals import StopRequest

    with StopRequest() as stop:
        from bpo.bootstrap.measure.command import expand, run_measure, write_balanced
        from bpo.config.io import load_config
        from bpo.job.launch import ranks_from_environment, setup_logging
        from bpo.job.terminal import printable

        ranks = ranks_from_environment()
        setup_logging(ranks)
        about = "Measure preference groups before training. GROUPS is short for --data.groups GROUPS."
        config = load_config(expand(argv), prog="bpo measure", description=about, reads=("data.groups",))
        found = run_measure(config, truth=_object_truth(config), ranks=ranks, stop=stop)
        for warning in found["warnings"] if found else ():
            print(printable(f"warning: {warning}"))
        if found:
            print(printable(f"written: {config.data.groups}.measures.json"))
        if found and config.measure.out:
            for line in write_balanced(config):
                print(printable(line))
            print(printable(f"written: {config.measure.out}"))
    return 0


def _rank(argv: list[str]) -> int:
    from bpo.job.signals import StopRequest

    with StopRequest() as stop:
        from bpo.config.io import load_config
        from bpo.job.launch import ranks_from_environment, setup_logging

        setup_logging(ranks_from_environment())
        about = "Score the completions of rank.candidates with a judge; with --images, the images of annotations."
        config = load_config([flag for flag in argv if flag != "--images"], prog="bpo rank", description=about)
        if "--images" in argv:
            from bpo.ranking.images import run_image_choice

            run_image_choice(config, stop)
        else:
            from bpo.ranking.run import run_rank

            run_rank(config, stop)
    return 0


def _select(argv: list[str]) -> int:
    from bpo.config.io import load_config
    from bpo.job.launch import Ranks, setup_logging

    setup_logging(Ranks())
    config = load_config(argv, prog="bpo select", description="Select preference pairs among scored candidates.")
    from bpo.ranking.select.run import run_select

    summary = run_select(config)
    print(f"{summary.num_groups} groups with {summary.num_pairs} pairs: {config.data.groups}")
    return 0


def _train(argv: list[str]) -> int:
    from bpo.job.signals import StopRequest

    with StopRequest() as stop:
        from bpo.config.io import load_config, train_inputs
        from bpo.job.launch import own_arguments

        load_config(own_arguments(argv), "bpo train", "Preference training in one process.", train_inputs)
        from bpo.train import main

        main(argv, stop)
    return 0


def _rounds(argv: list[str]) -> int:
    from bpo.job.signals import StopRequest

    with StopRequest() as stop:
        from bpo.rounds.command import main

        return main(argv, stop)


def _evaluate(argv: list[str]) -> int:
    if "--compare" in argv:
        from bpo.evaluation.compare import main

        return main(argv)
    from bpo.job.signals import StopRequest

    with StopRequest() as stop:
        from bpo.config.io import check_inputs, load_config
        from bpo.job.launch import ranks_from_environment, setup_logging

        setup_logging(ranks_from_environment())
        about = (
            "Measure hallucination with the benchmarks of a suite (--suite FILE), or with CHAIR and POPE. "
            "`--compare A.json B.json [--compare-decoding] [--json FILE]` gives the differences of two results."
        )
        config = load_config(argv, prog="bpo evaluate", description=about)
        if not config.evaluation.answers:
            check_inputs(config, ("model.path",))
        from bpo.evaluation.run import run_evaluation

        run_evaluation(config, stop=stop)
    return 0


def _judge(argv: list[str]) -> int:
    from bpo.job.signals import StopRequest

    with StopRequest() as stop:
        from bpo.config.io import load_config
        from bpo.job.launch import Ranks, setup_logging

        setup_logging(Ranks())
        about = "Judge answers to a benchmark with a language model on a server, always together with the base's."
        config = load_config(argv, prog="bpo judge", description=about, reads=("judge.prompt", "judge.base"))
        from bpo.evaluation.judge.run import run_judge

        run_judge(config, stop)
    return 0


def _export(argv: list[str]) -> int:
    from bpo.config.io import load_config
    from bpo.job.launch import Ranks, setup_logging

    setup_logging(Ranks())
    config = load_config(argv, prog="bpo export", description="Export a trained model or adapter.")
    from bpo.checkpoint.export import run_export

    print(run_export(config))
    return 0


def _view(argv: list[str]) -> int:
    from bpo.tools.view.run import main

    return main(argv)


def _score(argv: list[str]) -> int:
    from bpo.tools.score import main

    return main(argv)


def _refs(argv: list[str]) -> int:
    from bpo.tools.refs import main

    return main(argv)


def _plan(argv: list[str]) -> int:
    from bpo.tools.plan.command import main

    return main(argv)


def _bench_kernels(argv: list[str]) -> int:
    from bpo_kernels.bench.command import main

    return main(argv)


def _bench_step(argv: list[str]) -> int:
    from bpo.tools.bench.step import main

    return main(argv)


def _bench_bootstrap(argv: list[str]) -> int:
    from bpo.tools.bench.bootstrap import main

    return main(argv)


BENCHMARKS: dict[str, Callable[[list[str]], int]] = {
    "bootstrap": _bench_bootstrap,
    "kernels": _bench_kernels,
    "step": _bench_step,
}


def _bench(argv: list[str]) -> int:
    if argv and argv[0] in BENCHMARKS:
        return BENCHMARKS[argv[0]](argv[1:])
    asked_for_help = bool(argv) and argv[0] in ("-h", "--help")
    usage = f"usage: bpo bench {{{','.join(BENCHMARKS)}}} [...]; `bpo bench NAME --help` lists its options"
    print(usage, file=sys.stdout if asked_for_help else sys.stderr)
    return 0 if asked_for_help else 2


def _doctor(argv: list[str]) -> int:
    from bpo.tools.doctor import main

    if argv:
        print("usage: bpo doctor\n\nChecks the environment and explains what each finding means for a run.")
        return 0 if argv[0] in ("-h", "--help") else 2
    return main()


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "demo": _demo,
    "check": _check,
    "convert": _convert,
    "bootstrap": _bootstrap,
    "merge": _merge,
    "measure": _measure,
    "rank": _rank,
    "select": _select,
    "train": _train,
    "rounds": _rounds,
    "evaluate": _evaluate,
    "judge": _judge,
    "export": _export,
    "refs": _refs,
    "score": _score,
    "view": _view,
    "plan": _plan,
    "bench": _bench,
    "doctor": _doctor,
}


def main(argv: list[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from bpo import __version__

        print(f"bpo {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        print(f"bpo: unknown command {arguments[0]!r}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    from bpo.job.exits import Interrupted, JobError, describe_unknown, exit_code_of, message_of
    from bpo.job.terminal import printable

    try:
        return COMMANDS[arguments[0]](arguments[1:])
    except (Interrupted, JobError) as reason:
        print(printable(f"bpo {arguments[0]}: {reason}"), file=sys.stderr)
        return reason.exit_code
    except KeyboardInterrupt:
        print(f"bpo {arguments[0]}: stopped by Ctrl-C", file=sys.stderr)
        return 130
    except Exception as error:  # invalid input: show the message without a traceback
        code = exit_code_of(error)
        text = message_of(error) if code is not None else describe_unknown(error, Path.cwd())
        print(printable(f"bpo {arguments[0]}: error: {text}"), file=sys.stderr)
        return code or 1


if __name__ == "__main__":
    sys.exit(main())
