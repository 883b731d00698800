"""Text from data, such as ids and file names, as a terminal may show it."""

from __future__ import annotations

import logging


def printable(text: object) -> str:
    """Returns the text with every character escaped that a terminal would obey or hide.

    Line breaks and tabs are kept. Escape sequences, carriage returns, bidirectional controls and lone surrogates become
    `\\x1b`, `\\u202e` and the like.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else _escaped(ord(c)) for c in str(text))


def _escaped(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class PrintableFormatter(logging.Formatter):
    """Formats log records, tracebacks included, as `printable` text."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
