"""
The decoder through kernels/: greedy tokens and log-probabilities equal Hugging Face's, and the
forms of the CPU are not touched. A machine without a GPU runs this file in Triton's interpreter
(test_kernels_interpreted.py starts it), one with a GPU on the GPU.
"""
import pytest
import torch
from kernel_checks import DEVICE, INTERPRETED
from models import hf_logprobs, ragged_prompts, small_model

import hybrid_engine
from hybrid_engine import InferenceEngine
from kernels import activation, decode_attention, decoder, linear, norm, rotary, sampling

pytestmark = pytest.mark.skipif(not (INTERPRETED or DEVICE == "cuda"),
                                reason="the CPU's forms: test_decoder.py's part")
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
    "llama-bias-tied": "RMSNorm, gated SiLU with bias, one key-value head, an odd head width",
    "mistral": "grouped heads, sliding window",
    "qwen3": "norms of q and k",
    "gemma": "norms by 1 + w, gated tanh GELU",
}
PUBLIC = {norm: ("add_layer_norm", "add_rms_norm"), activation: ("act", "gated_act"),
          rotary: ("rotary_cache",), decode_attention: ("decode_attention",), sampling: ("sample",)}
PLAIN = [(rotary, "rotary_cache_reference"), (decode_attention, "_decode_cpu"),
         (sampling, "_sample_cpu"), (sampling, "sample_reference"), (norm, "F")]


@pytest.fixture
def ran(monkeypatch):
    """
    The public ops that the decoder called. They must have launched kernels, because their plain
    forms raise here.
    """
    names = set()

    def refuse(*_, **__):
        raise AssertionError("a plain form ran")

    def noted(op):
        def call(*arguments, **options):
            names.add(op.__name__)
            return op(*arguments, **options)
        return call

    for module, ops in PUBLIC.items():
        for name in ops:
            for user in (hybrid_engine, decoder, linear):
                if hasattr(user, name):
                    monkeypatch.setattr(user, name, noted(getattr(module, name)))
    for module, plain in PLAIN:
        monkeypatch.setattr(module, plain, refuse)
    for forms in ("FORMS", "CPU_FORMS"):
        monkeypatch.setattr(activation, forms, dict.fromkeys(activation.FORMS, refuse))
    return names


@pytest.mark.parametrize("name", CASES)
def test_greedy_equals_hugging_face(name, ran):
    model = small_model(name).to(DEVICE)
    ids, mask = (t.to(DEVICE) for t in ragged_prompts(rows=3, length=P))
    rollout = InferenceEngine(model).generate(ids, mask, max_new_tokens=R, temperature=0)
    expected = model.generate(ids.masked_fill(mask == 0, 0), attention_mask=mask, max_new_tokens=R,
                              do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(rollout.tokens[:, P:], expected[:, P:])
    expected_logprobs = hf_logprobs(model, rollout.tokens, mask, P)
    torch.testing.assert_close(rollout.logprobs, expected_logprobs, atol=1e-4, rtol=0)
    if name in ("llama-bias-tied", "mistral", "qwen3", "gemma"):
        of_the_family = {"add_rms_norm", "gated_act"}
    else:
        of_the_family = {"add_layer_norm", "act"}
    assert ran == {"rotary_cache", "decode_attention", "sample"} | of_the_family


def test_finished_rows_leave():
    """Compaction under the kernels: rows keep their own start, position and cache."""
    model = small_model("mistral").to(DEVICE)
    ids, mask = (t.to(DEVICE) for t in ragged_prompts(rows=4, length=P))
    options = dict(max_new_tokens=R + 3, seed=1, eos_token_id=list(range(40, 70)), temperature=0.8,
                   top_k=90, top_p=0.95)
    on = InferenceEngine(model, sync_every=1)
    off = InferenceEngine(model, compact=False, sync_every=1)
    a = on.generate(ids, mask, **options)
    b = off.generate(ids, mask, **options)
    assert on.row_steps < off.row_steps and len(set(a.mask.sum(1).tolist())) > 1
    assert torch.equal(a.tokens, b.tokens)
    # not bit for bit, because the columns are split otherwise
    torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-4, rtol=0)
