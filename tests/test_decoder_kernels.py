"""
The decoder through kernels/: greedy tokens and log-probabilities equal Hugging Face's, and the forms of the CPU are not
touched. A machine without a GPU runs this file in Triton's interpreter (test_kernels_interpreted.py starts it), one
with a GPU on the GPU.
"""
import pytest
import torch
from kernel_checks import DEVICE, INTERPRETED
from models import hf_logprobs, ragged_prompts, small_model

import hybrid_engine
from hybrid_engine import InferenceEngine
from kernels import activation, decode_attention, decoder, linear, norm, rotary, sampling

pytestmark = pytest.mark.skipif(not (INTERPRETED or DEVICE == "cuda"), reason="the CPU's forms: test_decoder.py's part")
P, R = 6, 5

CASES = {  # what each one is here for
    "opt": "LayerNorm, relu with bias",
    "opt-350m": "norms after the sum, projections round the blocks",
    "opt-no-bias": "LayerNorm without weights",
    "bloom": "ALiBi, a norm after the embedding",
    "gpt_neo": "local window, tanh GELU",
    "gptj": "interleaved and partial rotary, parallel residual with one norm",
    "gpt_neox": "parallel residual with two norms, GELU",
    "gpt_neox-yarn": "half-split rotary of half a head, with a factor",
    "llama-bias-tied": "RMSNorm, gated SiLU with bias, one key-value head, a head width that is no power of two",
    "mistral": "grouped heads, sliding window",
    "qwen3": "norms of q and k",
    "gemma": "norms by 1 + w, gated tanh GELU",
}
PUBLIC = {norm: ("add_layer_norm", "add_rms_norm"), activation: ("act", "gated_act"), rotary: ("rotary_cache",),
          decode_attention: ("decode_attention",), sampling: ("sample",)}


@pytest.fixture
def ran(monkeypatch):
    """The public ops that the decoder called, which must have launched kernels: their plain forms raise here."""
    names = set()

    def refuse(*_, **__):
        raise AssertionError("a plain form ran")

    for module, ops in PUBLIC.items():
        for name in ops:
            for user in (hybrid_engine, decoder, linear):
                if hasattr(user, name):
                    op = getattr(module, name)
                    monkeypatch.setattr(user, name, lambda *a, op=op, name=name, **k: (names.add(name), op(*a, **k))[1])
    for module, plain in ((rotary, "rotary_cache_reference"), (decode_attention, "_decode_cpu"),
                          (sampling, "_sample_cpu"), (sampling, "sample_reference"), (norm, "F")):
        monkeypatch.setattr(module, plain, refuse)
    for forms in ("FORMS", "CPU_FORMS"):
        monkeypatch.setattr(activation, forms, dict.fromkeys(activation.FORMS, refuse))
    return names


@pytest.mark.parametrize("name", CASES)
def test_greedy_equals_hugging_face(name, ran):
    model, (ids, mask) = small_model(name).to(DEVICE), (t.to(DEVICE) for t in ragged_prompts(rows=3, length=P))
    rollout = InferenceEngine(model).generate(ids, mask, max_new_tokens=R, temperature=0)
    expected = model.generate(ids.masked_fill(mask == 0, 0), attention_mask=mask, max_new_tokens=R, do_sample=False,
                              eos_token_id=None, pad_token_id=0)
    assert torch.equal(rollout.tokens[:, P:], expected[:, P:])
    torch.testing.assert_close(rollout.logprobs, hf_logprobs(model, rollout.tokens, mask, P), atol=1e-4, rtol=0)
    llama_like = name in ("llama-bias-tied", "mistral", "qwen3", "gemma")
    assert ran == {"rotary_cache", "decode_attention", "sample", "add_rms_norm" if llama_like else "add_layer_norm",
                   "gated_act" if llama_like else "act"}


def test_finished_rows_leave():
    """Compaction under the kernels: rows keep their own start, position and cache."""
    model, (ids, mask) = small_model("mistral").to(DEVICE), (t.to(DEVICE) for t in ragged_prompts(rows=4, length=P))
    options = dict(max_new_tokens=R + 3, seed=1, eos_token_id=list(range(40, 70)), temperature=0.8, top_k=90,
                   top_p=0.95)
    on, off = InferenceEngine(model, sync_every=1), InferenceEngine(model, compact=False, sync_every=1)
    a, b = (engine.generate(ids, mask, **options) for engine in (on, off))
    assert on.row_steps < off.row_steps and len(set(a.mask.sum(1).tolist())) > 1
    assert torch.equal(a.tokens, b.tokens)
    torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-4, rtol=0)  # other splits of the columns
