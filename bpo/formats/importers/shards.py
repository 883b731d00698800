"""WebDataset tar shards: files with the same name up to the first dot form one sample."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from bpo.formats.compressed import StreamError
from bpo.formats.jsonfiles import Piece, open_file, parse_json
from bpo.formats.jsonscan import Damage
from bpo.formats.problems import RecordError

IMAGE_SUFFIXES = frozenset("jpg jpeg png webp gif bmp tif tiff avif ppm pgm".split())
MAX_MEMBER_BYTES = 256 << 20  # of a member, and of the members of one sample together
MAX_HEADER_BYTES = 1 << 20


def tar_pieces(path: Path) -> Iterator[Piece]:
    """Yields one record per sample: fields of KEY.json, the image as `{"bytes", "path"}`, KEY.txt as `txt`, and so on.

    Several images (KEY.0.jpg, KEY.1.jpg) become a list in shard order. Hidden files, such as macOS metadata files, are
    skipped. Nothing is unpacked to disk.
    """
    index = 0
    sample = _Sample("")
    try:
        # Not "r|": stream mode does not notice a file truncated inside a member.
        with open_file(path) as file, tarfile.open(fileobj=(source := _Bounded(file)), mode="r:") as tar:  # type: ignore[call-overload]
            while (member := source.next_of(tar)) is not None:
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
    except StreamError as error:
        yield Piece(f"{path}, sample {sample.key!r}", index, False, {}, Damage(error.code, str(error)))
        return
    except (tarfile.TarError, OSError, EOFError) as error:
        damage = Damage("torn-record", f"the shard is damaged or truncated here ({error}); download it again")
        yield Piece(f"{path}, sample {sample.key!r}", index, False, {}, damage)
        return
    if sample.key:
        yield sample.piece(path, index)


def is_tar(path: Path) -> bool:
    """Returns whether a file, decompressed, is a tar archive; raises `ValueError` if it cannot be read."""
    try:
        with open_file(path) as file, tarfile.open(fileobj=_Bounded(file), mode="r:"):  # type: ignore[call-overload]
            return True
    except (tarfile.TarError, StreamError):
        return False


class _Bounded:
    """A file for `tarfile`, which reads a header of any size at once."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._max_bytes = MAX_HEADER_BYTES
        self.tell, self.close = file.tell, file.close

    def next_of(self, tar: tarfile.TarFile) -> tarfile.TarInfo | None:
        self._max_bytes = MAX_HEADER_BYTES
        member = tar.next()
        self._max_bytes = MAX_MEMBER_BYTES
        return member

    def read(self, size: int) -> bytes:
        if size > self._max_bytes:
            raise tarfile.ReadError(f"a header of {size} bytes")
        # `tarfile` steps back by one byte: keep it in the buffer.
        return self._file.read(size - 1) + self._file.read(1) if size else b""

    def seek(self, position: int) -> int:
        return self._file.seek(position)


class _Sample:
    def __init__(self, key: str):
        self.key = key
        self._num_bytes = 0
        self.fields: dict[str, Any] = {}
        self.images: list[dict[str, Any]] = []
        self.damage: Damage | None = None

    def add(self, member: tarfile.TarInfo, suffix: str, file: IO[bytes] | None) -> None:
        self._num_bytes += member.size + tarfile.BLOCKSIZE
        if file is None:
            self.damage = Damage("wrong-type", f"member {member.name!r} is a link or device; pack a regular file")
        elif self._num_bytes > MAX_MEMBER_BYTES:
            self.damage = Damage(
                "too-large",
                f"with member {member.name!r} the sample has more than {MAX_MEMBER_BYTES >> 20} MiB; split it",
            )
        if file is None or self.damage is not None:
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
