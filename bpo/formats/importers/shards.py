"""WebDataset tar shards: files with the same name up to the first dot form one sample."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from bpo.formats.jsonfiles import Piece, parse_json
from bpo.formats.jsonscan import Damage
from bpo.formats.problems import RecordError

IMAGE_SUFFIXES = frozenset("jpg jpeg png webp gif bmp tif tiff avif ppm pgm".split())
MAX_MEMBER_BYTES = 256 << 20


def tar_pieces(path: Path) -> Iterator[Piece]:
    """Yields one record per sample: fields of KEY.json, the image as `{"bytes", "path"}`, KEY.txt as `txt`, and so on.

    Several images (KEY.0.jpg, KEY.1.jpg) become a list in shard order. Hidden files, such as macOS metadata files, are
    skipped. Nothing is unpacked to disk.
    """
    index = 0
    sample = _Sample("")
    try:
        # Not "r|*": stream mode does not notice a file truncated inside a member.
        with tarfile.open(path, "r:*") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # bounds memory
                if member.isdir():
                    continue
                member.name = member.name.removeprefix("./")
                folder, _, name = member.name.rpartition("/")
                if name.startswith("."):
                    continue
                stem, _, suffix = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if key != sample.key:
                    if sample.key:
                        yield sample.piece(path, index)
                        index += 1
                    sample = _Sample(key)
                sample.add(member, suffix.lower(), tar.extractfile(member) if member.isfile() else None)
    except (tarfile.TarError, OSError, EOFError) as error:
        damage = Damage("torn-record", f"the shard is damaged or truncated here ({error}); download it again")
        yield Piece(f"{path}, sample {sample.key!r}", index, False, {}, damage)
        return
    if sample.key:
        yield sample.piece(path, index)


class _Sample:
    def __init__(self, key: str):
        self.key = key
        self.fields: dict[str, Any] = {}
        self.images: list[dict[str, Any]] = []
        self.damage: Damage | None = None

    def add(self, member: tarfile.TarInfo, suffix: str, file: IO[bytes] | None) -> None:
        if file is None or member.size > MAX_MEMBER_BYTES:
            what = "a link or device" if file is None else f"of {member.size} bytes"
            self.damage = Damage("wrong-type", f"member {member.name!r} is {what}; pack a regular file")
            return
        raw = file.read()
        kind = suffix.rpartition(".")[2]
        try:
            if kind in IMAGE_SUFFIXES:
                self.images.append({"bytes": raw, "path": member.name})
            elif kind == "json":
                value = parse_json(raw, f"member {member.name!r}")
                if not isinstance(value, dict):
                    raise RecordError("not-an-object", f"member {member.name!r} is not a JSON object; write {{...}}")
                self.fields |= value
            else:
                self.fields[suffix] = raw.decode("utf-8")
        except UnicodeDecodeError:
            self.damage = Damage(
                "invalid-utf8", f"member {member.name!r} is neither an image nor UTF-8 text; remove it"
            )
        except RecordError as error:
            self.damage = Damage(error.code, str(error))

    def piece(self, path: Path, index: int) -> Piece:
        fields = {"id": self.key, **self.fields}
        if len(self.images) == 1:
            named = fields.get("image")
            # The annotation's name of the image takes precedence over its name in the shard.
            image = {**self.images[0], "path": named} if isinstance(named, str) and named else self.images[0]
            fields["image"] = image
        elif self.images:
            fields.pop("image", None)
            fields["images"] = self.images
        return Piece(f"{path}, sample {self.key!r}", index, False, fields, self.damage)
