"""Content addresses of groups and cells: image bytes and token ids, so that a changed record is computed again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from bpo.data.cells import AUXILIARY, CLEAN, Cell, GroupCells, completion_ids, view_of
from bpo.data.encode import EncodedGroup

KEY_HEX = 64  # digits of a key


def group_key(group: EncodedGroup, image_digests: Sequence[str]) -> str:
    """Of everything that is read from a group's record and images."""
    content: list[Any] = [
        list(image_digests),
        list(group.prompt.prefix_ids),
        [list(ids) for ids in group.completion_ids],
    ]
    if group.views:
        content.append([[v.name, list(v.prompt.prefix_ids), [list(i) for i in v.completion_ids]] for v in group.views])
    return _digest(content)


def cell_key(
    group: EncodedGroup,
    cell: Cell,
    image_digests: Sequence[str],
    identity_of_view: Callable[[str], str] = str,
) -> str:
    """Of everything that the log-probs of a cell depend on, other than the model.

    Args:
        image_digests: Of the group's images.
        identity_of_view: What a changed view depends on in addition to images and record (`Views.identity`); not needed
            for cells of the clean images.
    """

    def under(view: str) -> list[Any]:
        plain = view == CLEAN or view.startswith(AUXILIARY)
        # A random view is drawn from the record's id, which a clean one does not depend on.
        drawn = [] if plain else [identity_of_view(view), group.prompt.record_id]
        return [list(image_digests), *drawn, list(view_of(group, view)[0].prefix_ids)]

    content = [under(cell.view), list(completion_ids(group, cell))]
    if cell.argmax_of is not None:
        content.append(["argmax", under(cell.argmax_of)])
    return _digest(content)


def cell_keys(
    group: EncodedGroup, cells: GroupCells, image_digests: Sequence[str], identity_of_view: Callable[[str], str]
) -> str:
    """The keys of the cells that the reference scores, in order, `KEY_HEX` digits each."""
    return "".join(cell_key(group, cell, image_digests, identity_of_view) for cell in _scored(cells))


def keys_by_cell(cells_of_reference: GroupCells, keys: str) -> dict[Cell, str]:
    """The inverse of `cell_keys`."""
    scored = _scored(cells_of_reference)
    return {cell: keys[KEY_HEX * k : KEY_HEX * (k + 1)] for k, cell in enumerate(scored)}


def split_keys(keys: str) -> list[str]:
    return [keys[start : start + KEY_HEX] for start in range(0, len(keys), KEY_HEX)]


def _scored(cells: GroupCells) -> list[Cell]:
    return [cell for cell in cells.cells() if cell in cells.reference]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()
