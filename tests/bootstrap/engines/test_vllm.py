"""vLLM behind a stand-in of the same contract."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from bpo.bootstrap.engines.vllm import VllmEngine, keep_to_own_gpu
from bpo.job.chat_server import Reply
from tests.checkpoint.test_adapter import adapter
from tests.trained_checkpoint import LORA


@dataclass
class SamplingParams:
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    top_k: int = 0


class LLM:
    """As documented for vLLM 0.11: `chat` takes conversations with one sampling each, and gives one output each."""

    made: dict[str, Any]
    lora_request: Any = None

    def __init__(self, **options: Any):
        type(self).made = options

    def chat(
        self,
        messages: list[list[dict[str, Any]]],
        sampling_params: list[SamplingParams],
        *,
        use_tqdm: bool,
        add_generation_prompt: bool,
        continue_final_message: bool,
        lora_request: Any = None,
    ) -> list[Any]:
        assert add_generation_prompt != continue_final_message
        type(self).lora_request = lora_request
        outputs = []
        for conversation, sampling in zip(messages, sampling_params, strict=True):
            text = f"{conversation[-1]['content']} {sampling.seed} {continue_final_message} {sampling.top_k}"
            reason = "length" if sampling.max_tokens < 5 else "stop"
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(text=text, finish_reason=reason)]))
        return outputs


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    lora = ModuleType("vllm.lora.request")
    lora.LoRARequest = lambda name, number, path: (name, number, path)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.lora.request", lora)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setenv("RANK", "3")


def body(text: str, seed: int, max_tokens: int = 9, **more: Any) -> tuple[str, dict[str, Any]]:
    sampling = {"temperature": 0.5, "top_p": 1.0, "max_tokens": max_tokens, "seed": seed}
    return "r", {"messages": [{"role": "user", "content": text}], **sampling, **more}


def test_a_batch_goes_to_vllm_with_each_records_own_sampling(vllm: None) -> None:
    engine = VllmEngine("DIR", "bfloat16", local_rank=1, max_images=2)
    assert LLM.made == {"model": "DIR", "dtype": "bfloat16", "limit_mm_per_prompt": {"image": 2}}
    bodies = [
        body("a", 1),
        body("b", 2, top_k=50, continue_final_message=True, add_generation_prompt=False),
        body("c", 3, 4),
    ]
    assert dict(engine.replies(bodies)) == {
        0: Reply("a 1 False 0"),
        1: Reply("b 2 True 50"),
        2: Reply("c 3 False 0", finished=False),
    }


def test_an_adapter_answers_on_its_base(vllm: None, tiny_llava_dir: Path, tmp_path: Path) -> None:
    path = str(adapter(tmp_path / "a", tiny_llava_dir, replace(LORA, r=24)))
    engine = VllmEngine("DIR", "auto", local_rank=0, max_images=1, adapter=path)
    assert LLM.made["model"] == "DIR" and (LLM.made["enable_lora"], LLM.made["max_lora_rank"]) == (True, 32)
    assert dict(engine.replies([body("a", 1)])) == {0: Reply("a 1 False 0")}
    assert LLM.lora_request == ("policy", 1, path)
    projector = str(adapter(tmp_path / "b", tiny_llava_dir, projector="full"))
    with pytest.raises(ValueError, match=r"that vLLM refuses: .*trained projector.*--export.form merged"):
        VllmEngine("DIR", "auto", local_rank=0, max_images=1, adapter=projector)


def test_a_rank_keeps_to_its_own_gpu_and_out_of_the_jobs_group() -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "4,6", "RANK": "3", "WORLD_SIZE": "8", "PATH": "x"}
    keep_to_own_gpu(environ, local_rank=1)
    assert environ == {"CUDA_VISIBLE_DEVICES": "6", "PATH": "x"}
    bare: dict[str, str] = {}
    keep_to_own_gpu(bare, local_rank=2)
    assert bare == {"CUDA_VISIBLE_DEVICES": "2"}


def test_without_vllm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    for name in ("CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "0")  # set, so that monkeypatch puts them back
    with pytest.raises(ValueError, match=r"bpo\[vllm\]"):
        VllmEngine("DIR", "auto", 0, 0)
