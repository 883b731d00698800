"""Reads options that are written as a mapping, such as a benchmark of a suite, into their dataclass."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from bpo.config.options import Section

SectionType = TypeVar("SectionType", bound=Section)


def read_entry(kind: type[SectionType], tree: Mapping[str, Any], name: str, where: Callable[[str], str]) -> SectionType:
    """The options as their dataclass, with types and ranges checked.

    Args:
        name: Whose options they are, for messages.
        where: Gives the place where an option is written, or of all of them for "".

    Raises:
        ValueError: An option is unknown, has the wrong type or is out of range.
    """
    from jsonargparse import ArgumentParser

    known = tuple(option.name for option in fields(kind))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, as_group=False)
    built = {}
    for key, value in tree.items():
        if key not in known:
            raise ValueError(f"{where(str(key))}: unknown option `{key}` of {name}{nearest(str(key), known)}")
        try:
            built[key] = parser.instantiate(parser.parse_object({key: value}))[key]
        except Exception as error:  # jsonargparse wraps its own and those of nested sections
            reason = " ".join(str(error).split())
            raise ValueError(f"{where(key)}: {key} is {value!r}: {reason}") from error
    try:
        return kind(**built)
    except ValueError as error:
        of = next((key for key in built if str(error).startswith(f"{kind.where}.{key}")), "")
        place = where(of)
        raise ValueError(str(error) if str(error).startswith(place) else f"{place}: {error}") from error


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the closest known one, or else all."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean `{close[0]}`?" if close else f"; known are {', '.join(known)}"
