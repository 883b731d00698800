"""A page on which people look at preference groups.

    bpo view groups.jsonl --image-root IMAGES --out page      # then open page/index.html; nothing else is needed
    bpo view groups.jsonl --image-root IMAGES --serve         # on 127.0.0.1, for instance over ssh -L

Beside every image stand its weakened version, the prompt, the annotation and each negative with what it adds and drops.
Refused negatives are read from groups.jsonl.refused.jsonl where that lies beside; `--scores FILE` (from `bpo score`)
colours tokens by how training moved them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bpo.bootstrap.changes import load_lexicon
from bpo.bootstrap.merge import beside
from bpo.config_bootstrap import WeakenConfig
from bpo.data.formats import read_groups
from bpo.records import PreferenceGroup
from bpo.viewing.entries import Extras, entry_of, read_refused, read_scores, refused_only
from bpo.viewing.page import PageWriter
from bpo.viewing.pictures import job_of, make_pictures
from bpo.viewing.serve import server_of


def options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bpo view", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="groups.jsonl, or the paper's released JSON")
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
    return parser.parse_args(argv)


def build_page(chosen: argparse.Namespace, folder: Path) -> Path:
    """Writes the page of `chosen` into `folder`; returns its index.html.

    Raises:
        ValueError: a file has another form, or the folder holds something else.
    """
    groups = _sample(read_groups(chosen.data), chosen.limit)
    lexicon = load_lexicon(chosen.lexicon).objects
    extras = Extras(
        refused=read_refused(beside(chosen.data, "refused.jsonl")),
        scores=read_scores(chosen.scores) if chosen.scores else {},
    )
    writer = PageWriter(folder, chosen.data.name)
    jobs = [job_of(number, group) for number, group in enumerate(groups)]
    if chosen.no_images:
        pictures: Any = ({"image": None, "error": "", "weakened": {}} for _ in jobs)
    else:
        pictures = make_pictures(jobs, chosen.image_root, folder, WeakenConfig(), chosen.workers)
    for group, made in tqdm(zip(groups, pictures, strict=True), total=len(groups), desc="records", unit="record"):
        writer.add(entry_of(group, extras, lexicon, made))
    if not chosen.limit:
        shown = {group.id for group in groups}
        for record_id in extras.refused:
            if record_id not in shown:
                writer.add(refused_only(record_id, extras, lexicon))
    return writer.finish(_statistics(beside(chosen.data, "summary.json")))


def _sample(groups: tuple[PreferenceGroup, ...], limit: int) -> list[PreferenceGroup]:
    """All groups, or `limit` of them drawn at random, always the same, in the file's order."""
    if not limit or limit >= len(groups):
        return list(groups)
    return [groups[at] for at in sorted(random.Random(0).sample(range(len(groups)), limit))]


def _statistics(summary: Path) -> dict[str, Any]:
    if not summary.exists():
        return {}
    return json.loads(summary.read_text(encoding="utf-8")).get("statistics", {})


def serve(chosen: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="bpo-view-") as temporary:
        build_page(chosen, Path(temporary))
        with server_of(Path(temporary), chosen.port) as server:
            port = server.server_address[1]
            print(f"http://127.0.0.1:{port}/  (over ssh: ssh -L {port}:127.0.0.1:{port} HOST; ends with Ctrl-C)")
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print()


def main(argv: list[str]) -> int:
    chosen = options(argv)
    try:
        if chosen.serve:
            serve(chosen)
        else:
            print(build_page(chosen, chosen.out or beside(chosen.data, "page")).resolve())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
