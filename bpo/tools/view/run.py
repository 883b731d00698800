"""A page on which people look at preference groups.

    bpo view groups.jsonl --image-root IMAGES --out page      # then open page/index.html; nothing else is needed
    bpo view groups.jsonl --image-root IMAGES --serve         # on 127.0.0.1, for instance over ssh -L

Beside every image stand its weakened version, the prompt, the annotation and each negative with what it adds, drops and
changes. Refused negatives are read from groups.jsonl.refused.jsonl and the figures of each source from
groups.jsonl.summary.json, where those lie beside; `--scores FILE` (from `bpo score`) colours tokens by how training
moved them.
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
from bpo.tools.groups import add_bad_record_options
from bpo.tools.view.build import build_page
from bpo.tools.view.serve import server_of


def options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bpo view", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="groups.jsonl, the paper's JSON, TRL's, RLHF-V's or RLAIF-V's pairs")
    parser.add_argument("--image-root", type=Path, default=Path("."), help="folder that image paths are relative to")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, help="folder of the page (default: DATA.page)")
    where.add_argument("--serve", action="store_true", help="serve it on 127.0.0.1 and remove it at the end")
    parser.add_argument("--port", type=int, default=8765, help="with --serve (default: %(default)s; 0: any free one)")
    parser.add_argument("--limit", type=int, default=0, help="show a random sample of so many groups; 0: all")
    parser.add_argument("--scores", type=Path, help="per-token log-probs that `bpo score` wrote")
    parser.add_argument("--no-images", action="store_true", help="texts only")
    parser.add_argument("--lexicon", default="", help="objects to mark: a file as bpo/bootstrap/lexicon/en.yaml")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    add_bad_record_options(parser)
    chosen = parser.parse_args(argv)
    for name in ("limit", "workers", "port"):
        if getattr(chosen, name) < 0:
            parser.error(f"--{name} is {getattr(chosen, name)}; it must be 0 or more")
    return chosen


def serve(chosen: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="bpo-view-") as temporary:
        # The port first: building may take minutes.
        with server_of(Path(temporary), chosen.port) as server:
            build_page(chosen, Path(temporary))
            port = server.server_address[1]
            print(
                f"http://127.0.0.1:{port}/  (over ssh: ssh -L {port}:127.0.0.1:{port} HOST; ends with Ctrl-C)",
                flush=True,
            )
            server.serve_forever()


@contextmanager
def _ends_like_ctrl_c() -> Iterator[None]:
    """A closed terminal or a scheduler's end removes the temporary folder, too."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: list[str]) -> int:
    chosen = options(argv)
    try:
        with _ends_like_ctrl_c():
            if chosen.serve:
                serve(chosen)
            else:
                print(build_page(chosen, chosen.out or sibling_path(chosen.data, "page")).resolve())
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 0 if chosen.serve else 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
