"""Writes embedded or downloaded images to a folder, under names that cannot escape it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from bpo.formats.download import download
from bpo.formats.embedded import image_fields, take_embedded
from bpo.formats.images import ImageError, decode_image, resolve_image_path
from bpo.formats.problems import RecordError
from bpo.job.durable import write_durably

_SIGNATURES = ((b"\xff\xd8", ".jpg"), (b"\x89PNG", ".png"), (b"GIF8", ".gif"), (b"BM", ".bmp"), (b"RIFF", ".webp"))


class ImageFolder:
    """Destination folder for images.

    Args:
        root: The folder; created with the first image. If None, embedded images are an error that names the option.
        fetches_urls: Whether to download images given as http(s) URLs.
    """

    def __init__(self, root: Path | None, fetches_urls: bool = False):
        self.root, self.fetches_urls = root, fetches_urls
        self.num_written = 0

    def take(self, record: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """Returns the record with embedded images (and, with `fetches_urls`, URLs) replaced by paths below the folder.

        Raises:
            RecordError: There is no folder, or an image is invalid.
        """
        record = take_embedded(record, where, self.put)
        if not self.fetches_urls:
            return record
        fields = image_fields(record)
        return {name: self._fetched(value, where) if name in fields else value for name, value in record.items()}

    def put(self, name: str | None, content: bytes, where: str) -> str:
        """Writes an image and returns its path below the folder.

        The name is kept if it is a plain relative path not taken by another image; otherwise the content's SHA-256 is
        used.

        Raises:
            RecordError: There is no folder, or `load_image` does not support the content.
        """
        if self.root is None:
            raise RecordError("image-embedded", f"{where}: the image is embedded; set a folder with --images")
        decode_image(content, name or "embedded in the record")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{self.root} cannot be created ({error.strerror}); choose another folder") from error
        for relative in (*([name] if name and _is_plain(name) else []), _name_of(content)):
            try:
                path = resolve_image_path(self.root, relative)
            except ImageError as error:
                if error.code != "image-missing":
                    continue  # a folder or a link out of the root: fall back to the digest name
                try:
                    path = self._write(relative, content)
                except (FileExistsError, NotADirectoryError):
                    continue  # a parent folder of the name exists as a file
            if path.read_bytes() == content:
                return relative
        raise ImageError(
            f"{where}: {self.root / _name_of(content)} is not this image; empty the folder", "image-no-file"
        )

    def _write(self, relative: str, content: bytes) -> Path:
        assert self.root is not None
        path = self.root / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, content, sync=False)
        self.num_written += 1
        return path

    def _fetched(self, value: Any, where: str) -> Any:
        if isinstance(value, list):
            return [self._fetched(image, where) for image in value]
        if isinstance(value, str) and value.startswith(("http://", "https://")):
            return self.put(None, download(value), where)
        if isinstance(value, str) and "://" in value:
            resolve_image_path(Path(), value)  # refuses it, with the fix
        return value


def _is_plain(name: str) -> bool:
    path = PurePosixPath(name)
    is_short = len(name.encode("utf-8", "surrogatepass")) < 200
    return is_short and name.isprintable() and "\\" not in name and not path.is_absolute() and ".." not in path.parts


def _name_of(content: bytes) -> str:
    suffix = next((suffix for signature, suffix in _SIGNATURES if content.startswith(signature)), ".img")
    return hashlib.sha256(content).hexdigest()[:32] + suffix
