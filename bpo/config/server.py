"""Options of a server that answers chat completions."""

from __future__ import annotations

from dataclasses import dataclass

from bpo.config.options import Section, check, number, seconds


@dataclass(kw_only=True)
class ServerConfig(Section):
    """OpenAI-compatible server (vLLM, SGLang, llama.cpp, ...). The API key is read from OPENAI_API_KEY.

    Attributes:
        url: Base URL, such as http://localhost:8000/v1. Empty disables the server.
        model: Name of the model on the server.
        concurrency: Maximum number of concurrent requests.
        timeout_s: Timeout of a request in seconds, after which it is retried.
        requests_per_minute: Rate limit in requests per minute; 0 means no limit.
        patience_s: Seconds without any response after which the job stops; finished records are kept.
    """

    where = "server"

    url: str = ""
    model: str = ""
    concurrency: int = number(16, at_least=1, at_most=4096)
    timeout_s: float = seconds(120.0, at_least=0.1)
    requests_per_minute: float = number(0.0, at_least=1e-3, zero="no limit")
    patience_s: float = seconds(900.0, at_least=0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            not self.url or self.url.startswith(("http://", "https://")),
            f"server.url is {self.url!r}; it must have the form http://HOST:PORT/v1",
        )
        check(bool(self.model) or not self.url, "server.url is set but server.model is empty; set the served model")
