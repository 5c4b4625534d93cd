"""The decoder's numbers: float32 is that of transformers, bfloat16 stays near it, and broken weights are refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from stallscope_engine.config import EngineConfig
from stallscope_engine.engine import Engine, VirtualClock
from stallscope_engine.models.configs import NAMED, ModelConfig, load_config, random_prompt
from stallscope_engine.request import Request
from stallscope_telemetry.records import RequestInfo

torch = pytest.importorskip("torch", reason="torch is not installed (extra: engine)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: dev)")

from safetensors.torch import save_file  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: E402

from stallscope_engine.executors import torch_cpu  # noqa: E402
from stallscope_engine.executors.torch_cpu import TorchExecutor  # noqa: E402
from stallscope_engine.models.decoder import Decoder, ForwardPlan  # noqa: E402
from stallscope_engine.models.rotary import frequencies  # noqa: E402
from tests.engine.references import MODELS, TINY, save  # noqa: E402

TWO_LAYERS = replace(NAMED["tiny-llama"], num_hidden_layers=2)


def first_logits(monkeypatch: pytest.MonkeyPatch, config: ModelConfig, dtype: str) -> torch.Tensor:
    """Logits [request, vocabulary] of the first token of some requests, their prompts in chunks beside decodes."""
    seen: list[torch.Tensor] = []
    forward = Decoder.forward

    def keep(self: Decoder, plan: ForwardPlan) -> torch.Tensor:
        logits = forward(self, plan)
        seen.append(logits[: len(plan.sampled_rows) if plan.sampled_rows is not None else len(plan.positions)])
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "forward", keep)
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
    exact, rounded = (first_logits(monkeypatch, TWO_LAYERS, dtype) for dtype in ("float32", "bfloat16"))
    assert exact.shape == rounded.shape == (4, TWO_LAYERS.vocab_size)
    # 8 bits of mantissa: each rounding adds up to 0.4%, and a few dozen of them lie between a token and its logits.
    assert (exact - rounded).square().mean().sqrt() < 0.03 * exact.std()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_logits_are_those_of_transformers_for_chunks_of_prompts_beside_decodes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, shard_size: str
) -> None:
    reference = save(MODELS[name], tmp_path, max_shard_size=shard_size)
    assert (len([*tmp_path.glob("*.safetensors")]) > 1) == (shard_size == "20KB")
    assert replace(load_config(tmp_path), dtype=TINY.dtype) == MODELS[name]
    seen: dict[Request, list[torch.Tensor]] = {}

    def keep(logits: torch.Tensor, sampled: list[Request]) -> list[int]:
        for row, request in zip(logits, sampled, strict=False):
            seen.setdefault(request, []).append(row)
        return sample(logits, sampled)

    sample = torch_cpu._sample
    monkeypatch.setattr(torch_cpu, "_sample", keep)
    config = EngineConfig(max_num_seqs=8, max_num_batched_tokens=48, block_size=4, kv_blocks=120)
    engine = Engine(config, TorchExecutor(config, tmp_path, "float32"), VirtualClock(0))
    for handle, (prompt, output) in enumerate([(200, 4), (3, 40), (130, 20), (1, 30), (60, 60)]):
        engine.submit(
            Request(RequestInfo(handle, f"r{handle}", 0, prompt, output), random_prompt(TINY, prompt, handle))
        )
    while engine.scheduler.has_work:
        engine.step()
    assert len(seen) == 5
    for request, rows in seen.items():
        text = [*request.prompt_token_ids, *request.output_token_ids]
        expected = reference.logits(text)[request.info.prompt_tokens - 1 : -1]
        # Float32 rounds at 6e-8: what another order of additions makes of that is far below what a wrong term does.
        torch.testing.assert_close(torch.stack(rows), expected, rtol=0, atol=1e-4 * float(expected.std()))


def test_the_same_seed_draws_the_same_weights_and_another_seed_others() -> None:
    def outputs(seed: int) -> list[int]:
        config = EngineConfig(kv_blocks=10)
        engine = Engine(config, TorchExecutor(config, TWO_LAYERS, seed=seed), VirtualClock(0))
        request = Request(RequestInfo(0, "r0", 0, 20, 10), random_prompt(TWO_LAYERS, 20, seed=0))
        engine.submit(request)
        while engine.scheduler.has_work:
            engine.step()
        return request.output_token_ids

    assert outputs(seed=1) == outputs(seed=1)
    assert outputs(seed=1) != outputs(seed=2)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen3"])
def test_a_small_named_model_runs_in_either_data_type(name: str) -> None:
    for dtype in ("float32", "bfloat16"):
        config = EngineConfig(model=name, kv_blocks=10)
        engine = Engine(config, TorchExecutor(config, name, dtype), VirtualClock(0))
        request = Request(RequestInfo(0, "r0", 0, 20, 5), random_prompt(NAMED[name], 20, seed=0))
        engine.submit(request)
        while engine.scheduler.has_work:
            engine.step()
        assert len(request.output_token_ids) == 5


def test_llama_3_positions_turn_at_the_frequencies_of_transformers() -> None:
    config = NAMED["llama-1b"]
    assert config.rope_scaling is not None
    rope = {"rope_type": "llama3", "rope_theta": config.rope_theta} | asdict(config.rope_scaling)
    shape = transformers.LlamaConfig(
        hidden_size=config.hidden_size, num_attention_heads=config.num_attention_heads, rope_parameters=rope
    )
    expected = LlamaRotaryEmbedding(shape).inv_freq
    torch.testing.assert_close(frequencies(config), expected, rtol=1e-6, atol=0)


def write_config(folder: Path) -> None:
    shape = asdict(TWO_LAYERS)
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
