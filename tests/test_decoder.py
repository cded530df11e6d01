"""The decoder against Hugging Face's own forward and generate, family by family, on small random models on a CPU."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import hybrid_engine
from kernels import decoder as kernels_decoder
from hybrid_engine import InferenceEngine, sample
from kernels.decoder import FAMILIES
from models import SMALL, hf_logprobs, ragged_prompts, small_model

P, R = 9, 12


def hf_greedy(model, ids, mask, new=R):
    return model.generate(ids.masked_fill(mask == 0, 0), attention_mask=mask, max_new_tokens=new, do_sample=False,
                          eos_token_id=None, pad_token_id=0)[:, ids.size(1):]


# -----------------------------------------------------------------------------
# families

def test_every_family_is_here():
    assert {model_type for model_type, _ in SMALL.values()} == set(FAMILIES)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_greedy_equals_hugging_face(name, pack):
    model, (ids, mask) = small_model(name), ragged_prompts()
    rollout = InferenceEngine(model, pack=pack).generate(ids, mask, max_new_tokens=R, temperature=0)
    assert torch.equal(rollout.tokens[:, :P], ids)
    assert torch.equal(rollout.tokens[:, P:], hf_greedy(model, ids, mask))
    assert len(set(rollout.tokens[:, P:].flatten().tolist())) > 2  # the model is not stuck on one token
    torch.testing.assert_close(rollout.logprobs, hf_logprobs(model, rollout.tokens, mask, P), atol=1e-4, rtol=0)
    assert rollout.mask.shape == (5, R) and rollout.mask.min() == 1


@pytest.mark.parametrize("name", SMALL)
def test_sampled_logprobs_equal_a_training_forward(name):
    model, (ids, mask) = small_model(name), ragged_prompts()
    rollout = InferenceEngine(model).generate(ids, mask, max_new_tokens=R, temperature=0.7, seed=3)
    expected = hf_logprobs(model, rollout.tokens, mask, P, temperature=0.7)
    torch.testing.assert_close(rollout.logprobs, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", SMALL)
def test_bf16_sampler_is_the_trainer_after_long_prompts(name):
    """
    Far positions are where 16 bits of a bias run out: after 600 tokens the sampler's distribution
    is still the training forward's, to five thousandths of a nat per token.
    """
    from support.models import LanguageModel
    lengths = {key: 1024 for key in ("max_position_embeddings", "n_positions") if key in SMALL[name][1]}
    model = small_model(name, torch.bfloat16, std=0.05, **lengths)
    ids = torch.randint(101, (3, 600), generator=torch.Generator().manual_seed(1))
    starts = torch.tensor([[0], [80], [7]])
    mask = (torch.arange(600) >= starts).long()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BLOOM goes through Hugging Face
        engine = InferenceEngine(model)
    rollout = engine.generate(ids, mask, max_new_tokens=8, eos_token_id=None, seed=1)
    attention_mask = torch.cat([mask, rollout.mask.long()], 1)
    with torch.no_grad():
        logprobs, _ = LanguageModel(model)(rollout.tokens, attention_mask, rollout.mask)
    assert (logprobs - rollout.logprobs).abs().mean() < 5e-3


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_bf16_logprobs(name, pack):
    """
    Both sides are bf16 and carry their own rounding, hence 2e-2, and weights of the usual size: at the 0.3 of the
    other tests the logits are so large that bf16 says nothing.
    """
    model, (ids, mask) = small_model(name, torch.bfloat16, std=0.05), ragged_prompts()
    rollout = InferenceEngine(model, pack=pack).generate(ids, mask, max_new_tokens=R)
    torch.testing.assert_close(rollout.logprobs, hf_logprobs(model, rollout.tokens, mask, P), atol=2e-2, rtol=0)


def test_other_dtypes_run_unpacked():
    double, single = (InferenceEngine(small_model("llama", dtype)) for dtype in (torch.float64, torch.float32))
    a, b = (engine.generate(*ragged_prompts(), max_new_tokens=R, temperature=0) for engine in (double, single))
    assert torch.equal(a.tokens, b.tokens)  # not Hugging Face's: in float64 its eager attention is NaN on padded rows


@pytest.mark.parametrize("name", SMALL)
def test_a_row_alone_equals_the_row_in_a_batch(name):
    model, (ids, mask) = small_model(name), ragged_prompts()
    engine = InferenceEngine(model)
    together = engine.generate(ids, mask, max_new_tokens=R, temperature=0)
    for row in range(len(ids)):
        real = mask[row].bool()
        alone = engine.generate(ids[row:row + 1, real], mask[row:row + 1, real], max_new_tokens=R, temperature=0)
        assert torch.equal(alone.tokens[0, real.sum():], together.tokens[row, P:])
        torch.testing.assert_close(alone.logprobs[0], together.logprobs[row], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["opt", "bloom", "gpt_neo", "llama"])
def test_padding_never_matters(name):
    model, (ids, mask) = small_model(name), ragged_prompts()
    engine, wider = InferenceEngine(model), torch.nn.functional.pad(mask, (7, 0))
    expected = engine.generate(ids, mask, max_new_tokens=R, seed=1)
    for junk in (100, -100, 10 ** 9):  # ids that do not exist as well
        poisoned = torch.nn.functional.pad(ids, (7, 0)).masked_fill(wider == 0, junk)
        rollout = engine.generate(poisoned, wider, max_new_tokens=R, seed=1)
        assert torch.equal(rollout.tokens[:, :P + 7], poisoned)
        assert torch.equal(rollout.tokens[:, P + 7:], expected.tokens[:, P:])


class Lora(torch.nn.Module):
    """What the engine expects of an adapter: merged_weight() and bias."""

    def __init__(self, base):
        super().__init__()
        self.base, self.bias = base, base.bias
        self.a, self.b = torch.randn(3, base.weight.size(1)) * 0.2, torch.randn(base.weight.size(0), 3) * 0.2

    def merged_weight(self):
        return self.base.weight + (0.5 * self.b @ self.a).to(self.base.weight.dtype)


@pytest.mark.parametrize("pack", [True, False])
def test_lora_is_merged_into_the_copy(pack):
    torch.manual_seed(0)
    plain, adapted, (ids, mask) = small_model("opt"), small_model("opt"), ragged_prompts()
    for ours, theirs in zip(adapted.model.decoder.layers, plain.model.decoder.layers):
        for name in ("self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"):
            ours.set_submodule(name, Lora(ours.get_submodule(name)))
            theirs.get_submodule(name).weight.data = ours.get_submodule(name).merged_weight()
    a, b = (InferenceEngine(m, pack=pack).generate(ids, mask, max_new_tokens=R) for m in (adapted, plain))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.logprobs, b.logprobs)


# -----------------------------------------------------------------------------
# shapes, ends

@pytest.mark.parametrize("name", ["opt", "bloom", "gpt_neo", "codegen", "llama-bias-tied", "mistral"])
@pytest.mark.parametrize("rows, prompt, new", [(1, 1, 1), (1, 40, 3), (3, 1, 20), (2, 44, 20)])
def test_shapes(name, rows, prompt, new):  # the last fills OPT's 64 positions: the token at 63 is written, never read
    model, (ids, mask) = small_model(name), ragged_prompts(rows, prompt)
    rollout = InferenceEngine(model).generate(ids, mask.bool(), max_new_tokens=new, temperature=0)
    assert rollout.tokens.shape == (rows, prompt + new) and rollout.tokens.dtype == torch.int64
    assert rollout.logprobs.dtype == rollout.mask.dtype == torch.float32
    assert torch.equal(rollout.tokens[:, prompt:], hf_greedy(model, ids, mask, new))


@pytest.mark.parametrize("name, odd", [  # D = 13 and 9 and 7, which no vector unit divides
    ("opt", dict(hidden_size=39, num_attention_heads=3, word_embed_proj_dim=39, ffn_dim=41, vocab_size=97)),
    ("bloom", dict(hidden_size=45, n_head=5, vocab_size=103)), ("gpt_neo", dict(hidden_size=21, num_heads=3))])
def test_odd_sizes(name, odd):
    model, (ids, mask) = small_model(name, **odd), ragged_prompts(vocabulary=97)
    rollout = InferenceEngine(model).generate(ids, mask, max_new_tokens=R, temperature=0)
    assert torch.equal(rollout.tokens[:, P:], hf_greedy(model, ids, mask))


def test_a_kept_cache_changes_nothing():
    """Rollouts of one shape and of others, compacted and not, in the memory that the one before left behind."""
    model, eos = small_model("llama"), list(range(40, 60))
    kept = InferenceEngine(model, keep_cache=True)
    for seed, (rows, length, copies) in enumerate([(12, 9, 2), (12, 9, 2), (24, 9, 1), (1, 1, 1), (12, 9, 2)]):
        ids, mask = ragged_prompts(rows, length, seed=seed)
        options = dict(max_new_tokens=R, eos_token_id=eos, seed=seed, num_return_sequences=copies)
        a, b = (engine.generate(ids, mask, **options) for engine in (kept, InferenceEngine(model)))
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.logprobs, b.logprobs)


def test_what_a_caller_can_get_wrong():
    model, (ids, mask) = small_model("opt"), ragged_prompts()
    engine = InferenceEngine(model)
    with pytest.raises(ValueError, match="64 positions"):
        engine.generate(ids, mask, max_new_tokens=60)
    for wrong in (mask.flip(1), mask * 0, torch.tensor([[1, 0, 1, 1, 1, 1, 1, 1, 1]]).expand(5, -1)):
        with pytest.raises(ValueError, match="left-padded"):
            engine.generate(ids, wrong, max_new_tokens=2)


def ends(rollout, eos, prompt=P):
    """Lengths by the definition: up to and including the first EOS of the response."""
    lengths = []
    for row in rollout.tokens[:, prompt:].tolist():
        lengths.append(next((i + 1 for i, token in enumerate(row) if token in eos), len(row)))
    return torch.tensor(lengths)


@pytest.mark.parametrize("pad", [0, 7])  # 7: pad is an EOS too
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("sync_every", [1, 4])
def test_eos(pad, compact, sync_every):
    model, (ids, mask) = small_model("llama"), ragged_prompts(rows=24)
    eos = [7, *range(40, 60)]
    ids[:, -2] = 7  # EOS inside a prompt is a token like any other
    free = InferenceEngine(model).generate(ids, mask, max_new_tokens=R, seed=2)
    rollout = InferenceEngine(model, compact=compact, sync_every=sync_every).generate(
        ids, mask, max_new_tokens=R, seed=2, eos_token_id=eos, pad_token_id=pad)
    lengths = ends(free, eos)
    longest = int(lengths.max())
    expected = torch.arange(longest) < lengths[:, None]
    assert 1 in lengths and len(set(lengths.tolist())) > 4  # a ragged batch
    assert torch.equal(rollout.mask, expected.float())
    assert torch.equal(rollout.tokens[:, P:], free.tokens[:, P:P + longest].masked_fill(~expected, pad))
    torch.testing.assert_close(rollout.logprobs, free.logprobs[:, :longest] * expected, atol=1e-5, rtol=0)


def test_logits_that_are_no_numbers_are_named():
    model, (ids, mask) = small_model("opt"), ragged_prompts()
    with torch.no_grad():
        model.model.decoder.layers[1].fc2.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN"):
        InferenceEngine(model).generate(ids, mask, max_new_tokens=2)


def test_all_rows_end_at_once():
    model, (ids, mask) = small_model("opt"), ragged_prompts()
    rollout = InferenceEngine(model).generate(ids, mask, max_new_tokens=R, eos_token_id=list(range(101)))
    assert rollout.tokens.shape == (5, P + 1) and rollout.mask.tolist() == [[1.0]] * 5


def test_one_eos_id():
    model, (ids, mask) = small_model("opt"), ragged_prompts()
    greedy = InferenceEngine(model).generate(ids, mask, max_new_tokens=R, temperature=0).tokens[0, P:].tolist()
    rollout = InferenceEngine(model).generate(ids, mask, max_new_tokens=R, temperature=0, eos_token_id=greedy[3])
    assert rollout.mask[0].sum() == greedy.index(greedy[3]) + 1


@pytest.mark.parametrize("name", ["opt", "llama", "bloom"])
def test_samples_of_a_prompt_share_its_prefill(name):
    model, (ids, mask) = small_model(name), ragged_prompts(rows=4)
    engine, sampling = InferenceEngine(model), dict(max_new_tokens=R, seed=5, eos_token_id=list(range(40, 60)))
    shared = engine.generate(ids, mask, num_return_sequences=3, **sampling)
    each = engine.generate(ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0), **sampling)
    assert torch.equal(shared.tokens, each.tokens) and torch.equal(shared.mask, each.mask)
    assert not torch.equal(shared.tokens[0], shared.tokens[1])


# -----------------------------------------------------------------------------
# compaction

@pytest.mark.parametrize("name", ["opt", "mistral", "bloom", "llama-3"])
def test_a_prefill_in_pieces_is_the_whole(name, monkeypatch):
    """Two prompts of nine columns at a time, and then the last."""
    model = small_model(name)
    ids, mask = ragged_prompts(5, 9)
    options = dict(max_new_tokens=6, num_return_sequences=3, eos_token_id=[4, 9], seed=3)
    whole = InferenceEngine(model).generate(ids, mask, **options)
    sizes = []
    run = kernels_decoder.Decoder._prefill

    def counted(self, ids, *rest):
        sizes.append(len(ids))
        return run(self, ids, *rest)

    monkeypatch.setattr(kernels_decoder, "PREFILL_TOKENS", 18)
    monkeypatch.setattr(kernels_decoder.Decoder, "_prefill", counted)
    pieces = InferenceEngine(model).generate(ids, mask, **options)
    assert sizes == [2, 2, 1]
    assert torch.equal(pieces.tokens, whole.tokens)
    torch.testing.assert_close(pieces.logprobs, whole.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["opt", "gpt_neo", "bloom", "llama", "mistral"])
def test_compaction_changes_nothing_but_the_cost(name):
    model, (ids, mask) = small_model(name), ragged_prompts(rows=32)
    eos = list(range(11, 20))
    off, on = InferenceEngine(model, compact=False), InferenceEngine(model)
    a, b = (engine.generate(ids, mask, max_new_tokens=40, seed=4, eos_token_id=eos) for engine in (off, on))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.mask, b.mask)
    torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-5, rtol=0)
    assert on.row_steps < 0.8 * off.row_steps


def test_a_ragged_rollout_costs_what_it_generates(monkeypatch):
    """Lengths geometric with a quarter of the maximum as mean: at most half of the row-steps."""
    model, R = small_model("opt"), 48
    ids, mask = ragged_prompts(rows=64, length=8)
    geometric = torch.distributions.Geometric(4 / R).sample((64,)).int()

    def scripted(logits, uniform, **_):  # the row's own uniform, constant over steps, names its length
        steps["n"] += 1
        ends = (geometric[(uniform * 64).long()] < steps["n"]).long()
        return ends * 7, torch.zeros(len(logits))

    monkeypatch.setattr(hybrid_engine, "sample", scripted)
    monkeypatch.setattr(torch, "rand", lambda n, rows, **_: ((torch.arange(rows) + 0.5) / 64).expand(n, -1))
    cost = {}
    for compact in (True, False):
        steps = {"n": 0}
        engine = InferenceEngine(model, compact=compact)
        rollout = engine.generate(ids, mask, max_new_tokens=R, eos_token_id=7)
        assert torch.equal(rollout.mask.sum(1).int(), (geometric + 1).clamp(max=R))
        cost[compact] = engine.row_steps
    assert cost[True] <= 0.5 * cost[False]
    assert cost[True] >= (geometric.clamp(max=R - 1)).sum()  # no row-step is missing


# -----------------------------------------------------------------------------
# sampling

def test_greedy_sample():
    logits = torch.randn(6, 50, dtype=torch.bfloat16)
    tokens, logprobs = sample(logits, torch.rand(6), temperature=0)
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(logprobs, logits.float().log_softmax(-1).max(-1).values)


@pytest.mark.parametrize("temperature, top_k, top_p, kept", [
    (1.0, 0, 1.0, range(8)), (0.6, 0, 1.0, range(8)), (1.7, 3, 1.0, range(3)), (1.0, 0, 0.75, range(3)),
    (0.8, 5, 0.9, range(4))])
def test_the_distribution(temperature, top_k, top_p, kept):
    """Chi-square of 40,000 draws against the distribution worked out here, and the log-probabilities with it."""
    weights = torch.tensor([0.4, 0.25, 0.15, 0.08, 0.06, 0.03, 0.02, 0.01])
    scaled = weights ** (1 / temperature)
    expected = torch.zeros(8)
    expected[list(kept)] = scaled[list(kept)] / scaled[list(kept)].sum()
    shuffle = torch.tensor([3, 6, 0, 5, 1, 7, 2, 4])
    uniform = torch.rand(40_000, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = sample(weights.log()[shuffle].expand(40_000, -1), uniform, temperature, top_k, top_p)
    counts = torch.bincount(shuffle[tokens], minlength=8).double()
    torch.testing.assert_close(logprobs, expected[shuffle[tokens]].log(), atol=1e-5, rtol=0)
    support = expected > 0
    chi2 = ((counts - 40_000 * expected)[support] ** 2 / (40_000 * expected[support])).sum()
    assert counts[~support].sum() == 0
    assert chi2 < 24.3  # 99.9% of chi-square with 7 degrees of freedom


def test_draws_at_the_edges():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(2, -1)
    tokens, logprobs = sample(logits, torch.tensor([0.0, 1 - 2 ** -24]))
    assert tokens.tolist() == [1, 3]
    torch.testing.assert_close(logprobs, torch.full((2,), 0.5).log())


def test_seeds():
    model, (ids, mask) = small_model("opt"), ragged_prompts()
    state = torch.get_rng_state()
    a, b, c = (InferenceEngine(model).generate(ids, mask, max_new_tokens=R, seed=s).tokens for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(state, torch.get_rng_state())  # nobody else's randomness moves


# -----------------------------------------------------------------------------
# the model and the memory

@pytest.mark.parametrize("name", ["opt", "gpt2", "gemma"])
@pytest.mark.parametrize("pack", [True, False])
def test_the_model_is_left_as_it_was(name, pack):
    model, (ids, mask) = small_model(name), ragged_prompts()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    engine = InferenceEngine(model, pack=pack)
    engine.generate(ids, mask, max_new_tokens=R, eos_token_id=list(range(40, 60)))
    assert model.training and all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert engine.cache is None and engine.memory["kv cache"] > 0


def test_weights_are_read_at_each_call():
    model, (ids, mask) = small_model("llama"), ragged_prompts()
    engine = InferenceEngine(model)
    engine.generate(ids, mask, max_new_tokens=R)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    rollout = engine.generate(ids, mask, max_new_tokens=R, seed=1)
    torch.testing.assert_close(rollout.logprobs, hf_logprobs(model, rollout.tokens, mask, P), atol=1e-4, rtol=0)


def test_memory_is_what_the_docstring_says():
    ids, mask = ragged_prompts()
    model = small_model("llama")
    engine = InferenceEngine(model, pack=False, keep_cache=True)
    engine.generate(ids, mask, max_new_tokens=R)
    sizes = {k: v.numel() * 4 for k, v in model.named_parameters()}
    fused = sum(v for k, v in sizes.items() if any(n in k for n in ("q_proj", "k_proj", "v_proj")))
    assert engine.memory == {"weights aliased": sum(sizes.values()) - fused, "weights copied": fused,
                             "kv cache": 2 * 3 * 5 * (P + R) * 2 * 12 * 4}
    assert engine.cache is not None
    address = engine.cache.data.data_ptr()
    engine.generate(ids, mask, max_new_tokens=R)
    assert engine.cache.data.data_ptr() == address
    packed = InferenceEngine(model)
    packed.generate(ids, mask, max_new_tokens=R)
    assert packed.memory["weights aliased"] == sum(v for k, v in sizes.items() if "norm" in k or "embed" in k)


@pytest.mark.parametrize("when", ["prefill", "step", "sample"])
def test_an_exception_frees_everything(monkeypatch, when):
    model, (ids, mask) = small_model("opt"), ragged_prompts()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    engine = InferenceEngine(model)

    def fail(*_, **__):
        raise RuntimeError("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(*(hybrid_engine, "sample") if when == "sample" else (hybrid_engine.Decoder, when), fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            engine.generate(ids, mask, max_new_tokens=R)
    assert engine.cache is None and not any(isinstance(v, hybrid_engine.Decoder) for v in vars(engine).values())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    rollout = engine.generate(ids, mask, max_new_tokens=R, temperature=0)
    assert torch.equal(rollout.tokens[:, P:], hf_greedy(model, ids, mask))


def test_a_rollout_can_be_trained_on():
    model, (ids, mask) = small_model("opt"), ragged_prompts()
    rollout = InferenceEngine(model).generate(ids, mask, max_new_tokens=R)
    logits = model(rollout.tokens, attention_mask=torch.cat([mask, rollout.mask.long()], 1)).logits[:, P - 1:-1]
    logprobs = logits.log_softmax(-1).gather(-1, rollout.tokens[:, P:, None]).squeeze(-1)
    (rollout.mask * (logprobs - rollout.logprobs).exp()).sum().backward()  # tensors of inference mode would refuse


# -----------------------------------------------------------------------------
# models that the decoder does not know

def test_unknown_families_go_through_hugging_face_and_say_so():
    from transformers import OlmoConfig, OlmoForCausalLM
    torch.manual_seed(0)
    model = OlmoForCausalLM(OlmoConfig(vocab_size=101, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
                                       intermediate_size=52, pad_token_id=None, bos_token_id=None, eos_token_id=5))
    # a model's own generation defaults are for its users; PPO learns from the policy itself
    model.generation_config.update(min_p=0.3, suppress_tokens=list(range(40, 90)), no_repeat_ngram_size=1, num_beams=3,
                                   repetition_penalty=2.0)
    defaults = model.generation_config.to_dict()
    ids, mask = ragged_prompts()
    with pytest.warns(UserWarning, match="'olmo' is not in kernels/decoder.py.s FAMILIES"):
        engine = InferenceEngine(model.train())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        greedy = engine.generate(ids, mask, max_new_tokens=R, temperature=0, eos_token_id=None)
        sampled = engine.generate(ids, mask, max_new_tokens=R, temperature=0.8, seed=1, num_return_sequences=2,
                                  eos_token_id=list(range(30, 60)), pad_token_id=33)
        again = engine.generate(ids, mask, max_new_tokens=R, temperature=0.8, seed=1, num_return_sequences=2,
                                eos_token_id=list(range(30, 60)), pad_token_id=33)
    assert model.training and model.generation_config.to_dict() == defaults
    model.generation_config = GenerationConfig()
    model.eval()
    assert greedy.tokens.shape == (5, P + R) and torch.equal(greedy.tokens[:, P:], hf_greedy(model, ids, mask))
    torch.testing.assert_close(greedy.logprobs, hf_logprobs(model, greedy.tokens, mask, P), atol=1e-4, rtol=0)
    assert torch.equal(sampled.tokens, again.tokens)
    assert torch.equal(sampled.mask.sum(1).long(), ends(sampled, range(30, 60)))
    expected = hf_logprobs(model, sampled.tokens, mask.repeat_interleave(2, 0), P, temperature=0.8)
    torch.testing.assert_close(sampled.logprobs, expected * sampled.mask, atol=1e-4, rtol=0)


def test_eos_is_the_models_own_unless_told_otherwise():
    """As in Hugging Face generate: a snippet that names no EOS stops where the model does."""
    model = small_model("llama")
    model.generation_config.eos_token_id = list(range(0, 101, 3))
    ids, mask = ragged_prompts()
    engine = InferenceEngine(model)
    own = engine.generate(ids, mask, max_new_tokens=R, seed=1)
    named = engine.generate(ids, mask, max_new_tokens=R, seed=1, eos_token_id=list(range(0, 101, 3)))
    assert torch.equal(own.tokens, named.tokens)
    assert own.mask.sum() < own.mask.numel()
    full = engine.generate(ids, mask, max_new_tokens=R, seed=1, eos_token_id=None)
    assert full.mask.sum() == full.mask.numel() == len(ids) * R


@pytest.mark.parametrize("decoder", [True, False])
def test_ids_that_no_tokenizer_knows_take_no_part(decoder, monkeypatch):
    """
    Embeddings wider than the vocabulary: such an id is never sampled, and sampler and training
    forward agree on the distribution of the others.
    """
    from support.models import LanguageModel
    model = small_model("llama")
    if not decoder:
        monkeypatch.setattr(hybrid_engine, "why_unsupported", lambda model: "for this test")
    ids, mask = ragged_prompts(vocabulary=60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = InferenceEngine(model, vocabulary=60)
    rollout = engine.generate(ids, mask, max_new_tokens=R, temperature=0.9, eos_token_id=None,
                              seed=3, num_return_sequences=20)
    responses = rollout.tokens[:, ids.size(1):]
    assert responses.max() < 60
    attention_mask = torch.cat([mask.repeat_interleave(20, 0), rollout.mask.long()], 1)
    trained = LanguageModel(model, vocabulary=60)
    with torch.no_grad():
        logprobs, _ = trained(rollout.tokens, attention_mask, rollout.mask, 0.9)
        wide, _ = LanguageModel(model)(rollout.tokens, attention_mask, rollout.mask, 0.9)
    torch.testing.assert_close(rollout.logprobs, logprobs, atol=1e-4, rtol=0)
    assert (logprobs - wide).mean() > 0.1  # the other 41 ids had mass
    everything = engine.generate(ids, mask, max_new_tokens=R, temperature=0, eos_token_id=None)
    assert everything.tokens[:, ids.size(1):].max() < 60


def test_what_the_decoder_cannot_run_of_a_known_family():
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.warns(UserWarning, match="rope type 'dynamic'"):
        InferenceEngine(small_model("llama", rope_parameters=dynamic))
    with pytest.warns(UserWarning, match="apply_residual_connection_post_layernorm"):
        InferenceEngine(small_model("bloom", apply_residual_connection_post_layernorm=True))
    with pytest.warns(UserWarning, match="activation"):
        InferenceEngine(small_model("opt", activation_function="mish"))
    with pytest.warns(UserWarning, match="slow_but_exact"):
        InferenceEngine(small_model("bloom", slow_but_exact=True, pretraining_tp=2))
    peft = pytest.importorskip("peft")
    adapted = small_model("llama")
    adapted.add_adapter(peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj", "up_proj"]))
    ids, mask = ragged_prompts()
    for model in (adapted, peft.get_peft_model(small_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))):
        with pytest.warns(UserWarning, match="PEFT adapters: merge"):
            engine = InferenceEngine(model)
        rollout = engine.generate(ids, mask, max_new_tokens=R, temperature=0)
        torch.testing.assert_close(rollout.logprobs, hf_logprobs(model, rollout.tokens, mask, P), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name, changes", [
    ("llama", dict(sliding_window=4)), ("gpt_neox", dict(sliding_window=4)), ("opt", dict(window_size=3)),
    ("mistral", dict(layer_types=3 * ["full_attention"])), ("mistral", dict(sliding_window=None)),
    ("qwen2", dict(use_sliding_window=False))])
def test_windows_are_those_hugging_face_uses(name, changes):
    """Llama reads no sliding_window, Mistral no layer_types: what only stands in a config must change nothing."""
    model, (ids, mask) = small_model(name, **changes), ragged_prompts()
    rollout = InferenceEngine(model).generate(ids, mask, max_new_tokens=R, temperature=0)
    torch.testing.assert_close(rollout.logprobs, hf_logprobs(model, rollout.tokens, mask, P), atol=1e-4, rtol=0)
