"""Options of `bpo judge`."""

from __future__ import annotations

from dataclasses import dataclass, field

from bpo.config.options import Section, number
from bpo.config.server import ServerConfig


@dataclass(kw_only=True)
class JudgeConfig(Section):
    """Judging of answers to a benchmark of `evaluation.suite` or `evaluation.questions` by a language model.

    Attributes:
        output: JSON file for the results.
        benchmark: Name of the benchmark in the suite; empty if the suite has only one that can be judged.
        base: Answers of the base model: results of `bpo evaluate`, or an official answer file. The base is judged in
            every run, since judges drift.
        answers: Answers of other models, as FILE or NAME=FILE.
        prompt: Text file with the judge's prompt; {question}, {answer} and others (docs/evaluation.md) are replaced.
        system_prompt: System turn before the prompt; empty sends none.
        images: Send the image with each request, for judges that see.
        num_runs: Number of times that each answer is judged; metrics are means.
        temperature: Sampling temperature of the judge; 0 is greedy.
        max_tokens: Maximum number of tokens per reply; 0 leaves it to the server.
        cache: File of all replies, which runs may share: the same request is never sent twice. Empty uses
            OUTPUT.replies.jsonl.
        server: Server of the judge.
    """

    where = "judge"

    output: str = ""
    benchmark: str = ""
    base: str = ""
    answers: list[str] = field(default_factory=list)
    prompt: str = ""
    system_prompt: str = ""
    images: bool = False
    num_runs: int = number(1, at_least=1, at_most=1000)
    temperature: float = number(0.0, at_least=0, zero="greedy")
    max_tokens: int = number(1024, at_least=1, zero="the server's own")
    cache: str = ""
    server: ServerConfig = field(default_factory=ServerConfig)
