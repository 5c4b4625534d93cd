"""Small random models of transformers, saved as Hugging Face folders: what the engine's numbers are compared with."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

from stallscope_engine.models.configs import ModelConfig, RopeScaling
from stallscope_engine.request import Request

torch = pytest.importorskip("torch", reason="torch is not installed (extra: engine)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: dev)")

NEAR_TIE = 1e-4  # of the reference's two best logits: either may win under another order of float32 additions

TINY = ModelConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=128,
    max_position_embeddings=512,
)
MODELS = {
    "grouped": TINY,
    "tied": replace(TINY, tie_word_embeddings=True),
    "one KV head": replace(TINY, num_key_value_heads=1, head_dim=16, rope_theta=500.0),
    "a KV head each": replace(TINY, num_key_value_heads=4, num_hidden_layers=1, rms_norm_eps=1e-3),
    # Of its eight pairs, some turn more than 4 times within 64 tokens, some less than once, and some between.
    "Llama 3.1": replace(TINY, head_dim=16, rope_theta=500.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64)),
    "Qwen2": replace(TINY, qkv_bias=True, tie_word_embeddings=True),
    "Qwen3": replace(TINY, qk_norm=True, head_dim=16, rms_norm_eps=1e-6, rope_theta=1e6),
    "Qwen3, tied": replace(TINY, qk_norm=True, num_key_value_heads=4, head_dim=24, tie_word_embeddings=True),
}


@dataclass(frozen=True)
class Reference:
    """A model of transformers and the folder that it was saved to."""

    model: transformers.PreTrainedModel
    folder: Path

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        return self.model(torch.tensor([token_ids])).logits[0]

    def check_greedy(self, request: Request) -> int:
        """Asserts that each output is the likeliest after those before it; returns how many it could judge."""
        prompt, outputs = list(request.prompt_token_ids), request.output_token_ids
        logits = self.logits(prompt + outputs)[len(prompt) - 1 : -1]
        for number, (row, token) in enumerate(zip(logits, outputs, strict=True)):
            best, second = row.topk(2).values
            if best - second < NEAR_TIE:
                return number
            assert token == row.argmax(), f"output {number} of request {request.info.handle}"
        return len(outputs)


def save(config: ModelConfig, folder: Path, **options: str) -> Reference:
    """A random model of this shape in float32, whose logits are far apart: few steps are near ties."""
    family = "Qwen3" if config.qk_norm else "Qwen2" if config.qkv_bias else "Llama"
    shape = asdict(config)
    scaling, ends = shape.pop("rope_scaling"), shape.pop("eos_token_ids")
    rope = {"rope_theta": shape.pop("rope_theta"), "rope_type": "llama3" if scaling else "default"} | (scaling or {})
    shape |= {"rope_parameters": rope, "eos_token_id": list(ends), "dtype": "float32", "initializer_range": 0.3}
    torch.manual_seed(7)
    model_class = getattr(transformers, f"{family}ForCausalLM")
    model = model_class(getattr(transformers, f"{family}Config")(**shape)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith(".bias"):
            torch.nn.init.uniform_(parameter, -1.0, 1.0)
    model.save_pretrained(folder, **options)
    return Reference(model, folder)
