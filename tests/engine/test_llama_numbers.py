"""The Llama's numbers: bfloat16 stays near float32, and broken weights are refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from stallscope_engine.config import EngineConfig
from stallscope_engine.engine import Engine, VirtualClock
from stallscope_engine.models.configs import NAMED, ModelConfig, random_prompt
from stallscope_engine.request import Request
from stallscope_telemetry.records import RequestInfo

torch = pytest.importorskip("torch", reason="torch is not installed (extra: engine)")

from safetensors.torch import save_file  # noqa: E402

from stallscope_engine.executors.torch_cpu import TorchExecutor  # noqa: E402
from stallscope_engine.models.llama import ForwardPlan, Llama  # noqa: E402

TINY = replace(NAMED["tiny-llama"], num_hidden_layers=2)


def first_logits(monkeypatch: pytest.MonkeyPatch, config: ModelConfig, dtype: str) -> torch.Tensor:
    """Logits [request, vocabulary] of the first token of some requests, their prompts in chunks beside decodes."""
    seen: list[torch.Tensor] = []
    forward = Llama.forward

    def keep(self: Llama, plan: ForwardPlan) -> torch.Tensor:
        logits = forward(self, plan)
        seen.append(logits[: len(plan.sampled_rows) if plan.sampled_rows is not None else len(plan.positions)])
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(Llama, "forward", keep)
        engine_config = EngineConfig(max_num_batched_tokens=100, kv_blocks=100)
        engine = Engine(engine_config, TorchExecutor(engine_config, config, dtype, seed=1), VirtualClock(0))
        for handle, tokens in enumerate((250, 30, 170, 7)):
            engine.submit(
                Request(RequestInfo(handle, f"r{handle}", 0, tokens, 1), random_prompt(config, tokens, handle))
            )
        while engine.scheduler.has_work:
            engine.step()
    return torch.cat(seen).float()


def test_bfloat16_logits_are_near_those_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, rounded = (first_logits(monkeypatch, TINY, dtype) for dtype in ("float32", "bfloat16"))
    assert exact.shape == rounded.shape == (4, TINY.vocab_size)
    # 8 bits of mantissa: each rounding adds up to 0.4%, and a few dozen of them lie between a token and its logits.
    assert (exact - rounded).square().mean().sqrt() < 0.03 * exact.std()


def test_the_same_seed_draws_the_same_weights_and_another_seed_others() -> None:
    def outputs(seed: int) -> list[int]:
        config = EngineConfig(kv_blocks=10)
        engine = Engine(config, TorchExecutor(config, TINY, seed=seed), VirtualClock(0))
        request = Request(RequestInfo(0, "r0", 0, 20, 10), random_prompt(TINY, 20, seed=0))
        engine.submit(request)
        while engine.scheduler.has_work:
            engine.step()
        return request.output_token_ids

    assert outputs(seed=1) == outputs(seed=1)
    assert outputs(seed=1) != outputs(seed=2)


def write_config(folder: Path) -> None:
    shape = asdict(TINY)
    shape["eos_token_id"] = list(shape.pop("eos_token_ids"))
    shape["architectures"] = ["LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors: can't read model\.embed_tokens\.weight"):
        TorchExecutor(EngineConfig(), tmp_path)


def test_a_weight_that_is_absent_or_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path)
    tensors = {"model.embed_tokens.weight": torch.zeros(2048, 256)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"can't read model\.layers\.0\.input_layernorm"):
        TorchExecutor(EngineConfig(), tmp_path)
    save_file({"model.embed_tokens.weight": torch.zeros(2048, 255)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"is \[2048, 255\], but config\.json says \[2048, 256\]"):
        TorchExecutor(EngineConfig(), tmp_path)


def test_a_broken_index_of_shards_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="not an index of weights"):
        TorchExecutor(EngineConfig(), tmp_path)
