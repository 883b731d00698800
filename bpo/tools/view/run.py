"""An HTML page for inspecting preference groups.

    bpo view groups.jsonl --image-root IMAGES --out page      # then open page/index.html
    bpo view groups.jsonl --image-root IMAGES --serve         # on 127.0.0.1, for example over ssh -L

The page shows every image with its weakened version, the prompt, the annotation and the diff of each negative. Refused
negatives are read from groups.jsonl.refused.jsonl and statistics by source from groups.jsonl.summary.json, if they
exist. `--scores FILE` (from `bpo score`) colours tokens by their log-ratio of policy to reference.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bpo.bootstrap.job.merge import sibling_path
from bpo.job.terminal import printable
from bpo.tools.groups import add_bad_record_options
from bpo.tools.view.build import build_page
from bpo.tools.view.serve import server_of


def parse_options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bpo view", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="groups.jsonl, the paper's JSON, TRL's, RLHF-V's or RLAIF-V's pairs")
    parser.add_argument("--image-root", type=Path, default=Path("."), help="folder that image paths are relative to")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, help="folder of the page (default: DATA.page)")
    where.add_argument("--serve", action="store_true", help="serve the page on 127.0.0.1, delete it afterwards")
    parser.add_argument("--port", type=int, default=8765, help="with --serve (default: %(default)s; 0: any free port)")
    parser.add_argument("--limit", type=int, default=0, help="number of groups, drawn at random; 0: all")
    parser.add_argument("--scores", type=Path, help="per-token log-probs written by `bpo score`")
    parser.add_argument("--no-images", action="store_true", help="texts only")
    parser.add_argument("--lexicon", default="", help="objects to mark, in the format of bpo/bootstrap/lexicon/en.yaml")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    add_bad_record_options(parser)
    options = parser.parse_args(argv)
    for name in ("limit", "workers", "port"):
        if getattr(options, name) < 0:
            parser.error(f"--{name} is {getattr(options, name)}; it must be 0 or more")
    return options


def serve(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="bpo-view-") as temporary:
        # Bind the port first: building may take minutes.
        with server_of(Path(temporary), options.port) as server:
            build_page(options, Path(temporary))
            port = server.server_address[1]
            print(
                f"http://127.0.0.1:{port}/  (over ssh: ssh -L {port}:127.0.0.1:{port} HOST; stop with Ctrl-C)",
                flush=True,
            )
            server.serve_forever()


@contextmanager
def _ends_like_ctrl_c() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP into KeyboardInterrupt, so that the temporary folder is removed."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: list[str]) -> int:
    options = parse_options(argv)
    try:
        with _ends_like_ctrl_c():
            if options.serve:
                serve(options)
            else:
                print(printable(build_page(options, options.out or sibling_path(options.data, "page")).resolve()))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 0 if options.serve else 130
    except (ValueError, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 1
    return 0
