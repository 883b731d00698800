"""A judge's prompt from the user's file: `{question}`, `{answer}` and other placeholders are replaced by texts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# {name}, {{name}} for a literal {name}, and {} of templates with positions. Other braces, as in JSON, are text.
_FIELD = re.compile(r"\{\{([A-Za-z_]\w*)\}\}|\{([A-Za-z_]\w*|)\}")


@dataclass(frozen=True, slots=True)
class JudgePrompt:
    """A prompt with placeholders."""

    template: str

    @classmethod
    def read(
        cls, path: Path, known: Sequence[str], needed: Sequence[str] = ("answer",), option: str = "judge.prompt"
    ) -> JudgePrompt:
        """Reads a UTF-8 file.

        Args:
            known: Placeholders that may occur.
            needed: Of these at least one must occur.
            option: Option that names the file, for messages.

        Raises:
            ValueError: The file cannot be read, or a placeholder is unknown, unnamed or missing.
        """
        try:
            template = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{option} {path} cannot be read ({error}); give a text file in UTF-8") from error
        names = [match.group(2) for match in _FIELD.finditer(template) if match.group(1) is None]
        listed = ", ".join(f"{{{name}}}" for name in known)
        for name in names:
            if name not in known:
                raise ValueError(
                    f"{option} {path}: unknown placeholder {{{name}}}; known are {listed}. "
                    "Write {{name}} for a literal {name}"
                )
        if not {*needed} & {*names}:
            missing = " or ".join(f"{{{name}}}" for name in needed)
            raise ValueError(f"{option} {path}: {missing} is missing, so the judge would see no answer; add it")
        return cls(template)

    def fill(self, fields: Mapping[str, str]) -> str:
        """The prompt with all placeholders replaced; braces in the values are not looked at."""
        return _FIELD.sub(
            lambda match: fields[match.group(2)] if match.group(1) is None else f"{{{match.group(1)}}}", self.template
        )
