"""Renders and tokenizes the texts of prompts and answers; a control token that they spell is plain text."""

from __future__ import annotations

import re
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from bpo.data.processor import PLACE, Processor
from bpo.records import Turn

# Private-use characters that replace a literal in the user's text while the chat template is rendered.
_LITERAL = "\ue0f0{}\ue0f1"
_LITERAL_RE = re.compile("\ue0f0(\\d+)\ue0f1")
# `split_special_tokens` is a state of the tokenizer during a call, in which another thread would lose its image tokens.
_ONE_THREAD = threading.RLock()


def control_tokens_of(tokenizer: Any, family_ids: Iterable[int]) -> dict[str, int]:
    """Returns all strings that the tokenizer encodes as a control token, with their ids.

    Args:
        family_ids: Ids of further control tokens, which need not be registered in the tokenizer.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    tokens = {str(token): index for index, token in added.items() if token.special}
    tokens |= {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    controls = sorted(family_ids)
    tokens |= dict(zip(tokenizer.convert_ids_to_tokens(controls), controls, strict=True))
    return {token: index for token, index in tokens.items() if token}


def end_of_answer(processor: Processor, candidates: Collection[int]) -> int:
    """Returns the control token that the chat template writes after an answer, or the tokenizer's EOS if none.

    Gemma's turns end with <end_of_turn> and Idefics3's with <end_of_utterance>, while EOS ends a document. Training
    with EOS instead would make the model unlearn its end-of-turn token.

    Args:
        candidates: Ids of the control tokens that may end an answer.
    """
    turns = [("user", "?"), ("assistant", PLACE)]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    rendered = processor.apply_chat_template(messages, add_generation_prompt=False)
    if "'type'" in rendered:  # the parts themselves, converted to text
        raise processor.only_text_error()
    after = processor.tokenizer(rendered.partition(PLACE)[2].lstrip(), add_special_tokens=False)["input_ids"]
    end: int = after[0] if after and after[0] in candidates else processor.tokenizer.eos_token_id
    return end


class ChatTokenizer:
    """The chat template and the tokenizer of a processor.

    A *literal* is a string in a text that equals a control token.

    Args:
        control_tokens: Strings that the tokenizer encodes as a control token.
        control_ids: Ids that no text may give.
    """

    def __init__(self, processor: Processor, control_tokens: Collection[str], control_ids: Collection[int]):
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self._control_ids = frozenset(control_ids)
        longest_first = sorted(control_tokens, key=len, reverse=True)
        self._literal_re = re.compile("|".join(map(re.escape, [*longest_first, *_LITERAL.split("{}"), PLACE])))

    def render(self, turns: Sequence[Turn]) -> tuple[list[str], list[str]]:
        """Renders the chat template; returns its pieces, in which odd ones are indices of literals, and the literals.

        A final assistant turn is the start of an answer: the rendered text ends with it, without an end of turn.

        Raises:
            ChatTemplateError: See `Processor.apply_chat_template` and `Processor.before_answer`.
        """
        literals: list[str] = []
        messages = []
        starts = bool(turns) and turns[-1].role == "assistant"
        for turn in turns[:-1] if starts else turns:
            texts = self._protected([part.text for part in turn.content if part.type == "text"], literals)
            content = [
                {"type": "image"} if part.type == "image" else {"type": "text", "text": next(texts)}
                for part in turn.content
            ]
            messages.append({"role": turn.role, "content": content})
        if starts:
            rendered = self.processor.before_answer(messages) + "".join(self._protected([turns[-1].text], literals))
        else:
            rendered = self.processor.apply_chat_template(messages)
        return _LITERAL_RE.split(rendered), literals

    def _protected(self, texts: Sequence[str], literals: list[str]) -> Iterator[str]:
        """Yields the texts of a turn with control tokens replaced by indices of `literals`, to which they are added.

        A template may join the texts, which may spell a control token together: then each text's share is a literal.
        """
        spans = [match.span() for match in self._literal_re.finditer("".join(texts))]
        offset = 0
        for text in texts:
            kept, done = "", 0
            for start, end in spans:
                start, end = max(start - offset, 0), min(end - offset, len(text))
                if start < end:
                    kept += text[done:start] + _LITERAL.format(len(literals))
                    literals.append(text[start:end])
                    done = end
            yield kept + text[done:]
            offset += len(text)

    def tokenize(self, pieces: Sequence[str], literals: Sequence[str]) -> list[int]:
        """Tokenizes a rendered prompt; literals are encoded as plain text."""
        # Add BOS only if the tokenizer adds one and the template did not write it. Tokens that the tokenizer appends to
        # a text (EOS) do not belong in a prompt.
        bos, bos_id = self.tokenizer.bos_token, self.tokenizer.bos_token_id
        with _ONE_THREAD:
            adds_bos = bos is not None and self.tokenizer("")["input_ids"][:1] == [bos_id]
            ids = [bos_id] if adds_bos and not pieces[0].startswith(bos) else []
            ids += self.tokenizer(pieces[0], add_special_tokens=False)["input_ids"]
            for index in range(1, len(pieces), 2):
                ids += self.plain(literals[int(pieces[index])])
                ids += self.tokenizer(pieces[index + 1], add_special_tokens=False)["input_ids"]
        return ids

    def plain(self, text: str) -> list[int]:
        """Encodes text without control tokens, even if it spells them."""
        with _ONE_THREAD:
            ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [index for index in ids if self._is_plain(index)]

    def plain_weights(self, text: str, spans: Sequence[tuple[int, int, float]]) -> list[float]:
        """Returns the weight of each token of `plain(text)`.

        A token has the weight of the span that contains its first character, leaving out white space before a word,
        which many tokenizers make part of the word's token. Tokens outside the spans and without characters have
        weight 1.

        Args:
            spans: (start, end, weight) in characters, in order and disjoint.

        Raises:
            ValueError: The tokenizer does not tell which characters a token stands for.
        """
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                f"weights of characters need a fast tokenizer, but {type(self.tokenizer).__name__} does not tell which "
                "characters a token stands for; save the model's tokenizer as tokenizer.json, or remove 'weights'"
            )
        with _ONE_THREAD:
            encoded = self.tokenizer(
                text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
            )
        weights = []
        for index, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if self._is_plain(index):
                word = text[start:end].lstrip()
                first = end - len(word) if word else start
                weights.append(next((w for s, e, w in spans if s <= first < e and start < end), 1.0))
        return weights

    def _is_plain(self, index: int) -> bool:
        return index not in self._control_ids or index == self.tokenizer.unk_token_id
