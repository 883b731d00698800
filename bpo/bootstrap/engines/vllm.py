"""In-process vLLM as a chat engine (extra `vllm`). One engine per rank, on the rank's own GPU.

Written against vLLM 0.11's `LLM.chat` and `LoRARequest`; not run with vLLM. Pictures are passed as data URLs, as for a
server.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from bpo.job.chat_server import Reply
from bpo.model.adapter import check_vllm_format, vllm_rank

# With these set, vLLM would try to join the job's own process group.
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class VllmEngine:
    """Answers a whole batch per call; vLLM schedules it.

    Args:
        path: Model directory or hub id.
        dtype: vLLM's name of the dtype; `auto` uses that of the model's config.
        local_rank: Index of this rank's GPU among the visible ones.
        max_images: Maximum images per prompt; 0 for a text-only LLM.
        adapter: Directory of a LoRA adapter for the model, or empty.

    Raises:
        ValueError: vLLM is not installed; names the extra. Or it does not take the adapter.
    """

    def __init__(self, path: str, dtype: str, local_rank: int, max_images: int, adapter: str = ""):
        if adapter:
            check_servable(adapter)
        keep_to_own_gpu(os.environ, local_rank)
        try:
            import vllm
        except ImportError as error:
            raise ValueError(f"the engine `vllm` requires vLLM ({error}); pip install 'bpo[vllm]'") from error
        self._sampling = vllm.SamplingParams
        settings: dict[str, Any] = {"limit_mm_per_prompt": {"image": max_images}} if max_images else {}
        self._lora: dict[str, Any] = {}
        if adapter:
            from vllm.lora.request import LoRARequest

            self._lora = {"lora_request": LoRARequest("policy", 1, adapter)}
            settings |= {"enable_lora": True, "max_lora_rank": vllm_rank(Path(adapter))}
        self._llm = vllm.LLM(model=path, dtype=dtype, **settings)

    def replies(self, bodies: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[tuple[int, Reply]]:
        """(index, reply) of each (record id, body); bodies that continue an answer use a separate call."""
        for continues in (False, True):
            chosen = [i for i, (_, body) in enumerate(bodies) if bool(body.get("continue_final_message")) == continues]
            if not chosen:
                continue
            outputs = self._llm.chat(
                [bodies[i][1]["messages"] for i in chosen],
                [self._sampling(**_sampling(bodies[i][1])) for i in chosen],
                use_tqdm=False,
                add_generation_prompt=not continues,
                continue_final_message=continues,
                **self._lora,
            )
            for index, output in zip(chosen, outputs, strict=True):
                answer = output.outputs[0]
                yield index, Reply(answer.text, finished=answer.finish_reason != "length")


def check_servable(adapter: str) -> None:
    """Raises ValueError if vLLM, here or as a server, does not take an adapter."""
    accepted, why = check_vllm_format(Path(adapter))
    if not accepted:
        raise ValueError(f"model.path {adapter} is an adapter that vLLM refuses: {why}")


def _sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: body[name] for name in ("temperature", "top_p", "top_k", "max_tokens", "seed") if name in body}


def keep_to_own_gpu(environ: MutableMapping[str, str], local_rank: int) -> None:
    """Restricts this process to one GPU and removes launcher variables; call before CUDA is initialized."""
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = visible.split(",") if visible else []
    environ["CUDA_VISIBLE_DEVICES"] = devices[local_rank % len(devices)] if devices else str(local_rank)
    for name in _LAUNCHER_VARIABLES:
        environ.pop(name, None)
