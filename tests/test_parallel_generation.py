"""
Tensor parallelism and ZeRO-3 with real processes (gloo, CPU) against one process on the same weights.

The ranks are spawned once and go through all the cases: starting Python is what costs the time.
"""

import sys
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import hybrid_engine
from hybrid_engine import InferenceEngine
from support.flags import RunConfig
from support.lora import add_lora
from models import LLAMA, SMALL, ragged_prompts, small_model
from ranks import run_ranks

R = 8
EOS = list(range(40, 55))


def prompts_of(rank):
    """Other numbers of prompts of other lengths on every rank."""
    return ragged_prompts(rows=3 + rank % 2, length=[9, 6, 11, 4][rank], seed=rank)


def union(ranks):
    """What `ranks` ranks generate for, in one batch: left-padded to the longest."""
    parts = [prompts_of(rank) for rank in range(ranks)]
    P = max(ids.size(1) for ids, _ in parts)
    ids, mask = (torch.cat([torch.nn.functional.pad(x, (P - x.size(1), 0)) for x in each]) for each in zip(*parts))
    first = [sum(len(part[0]) for part in parts[:rank]) for rank in range(ranks + 1)]
    return ids, mask, first


def expect(rollout, whole, rank, ranks, copies=1):
    """`rollout`, of this rank, is its rows of `whole`, which one process generated for everybody."""
    ids, mask = prompts_of(rank)
    union_ids, _, first = union(ranks)
    rows = slice(first[rank] * copies, first[rank + 1] * copies)
    longest = int(whole.mask[rows].sum(1).max())
    assert rollout.mask.shape == (len(ids) * copies, longest), (rollout.mask.shape, longest)
    assert torch.equal(rollout.tokens[:, :ids.size(1)], ids.repeat_interleave(copies, 0))
    assert torch.equal(rollout.mask, whole.mask[rows, :longest])
    assert torch.equal(rollout.tokens[:, ids.size(1):], whole.tokens[rows, union_ids.size(1):][:, :longest])
    torch.testing.assert_close(rollout.logprobs, whole.logprobs[rows, :longest], atol=1e-4, rtol=0)


def divisible(name, **changes):
    """The small model, with a number of heads that 2 and 4 ranks can split."""
    return small_model(name, **({"n_head": 4} if name == "bloom" else {}), **changes)


def lora(model, seed=5):
    """Adapters on everything in the blocks, A and B random; the same on every rank."""
    config = RunConfig(lora_dim=3, only_optimize_lora=True)
    add_lora(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


ADAPTED = ["opt", "gpt2", "llama-bias-tied"]  # as they are and under LoRA: two linear layouts, one shared head


def variants(name):
    """Functions that make the model: plain, and with adapters where that is to be tried."""
    return [lambda: divisible(name), lambda: lora(divisible(name))][:1 + (name in ADAPTED)]


def families(rank, ranks):
    """Tensor parallelism: over two ranks each with its own heads, over four with 2 or 1 key-value heads shared."""
    (ids, mask), (union_ids, union_mask, _) = prompts_of(rank), union(ranks)
    new = R if ranks == 2 else 4
    for name in SMALL:
        for make in variants(name):
            model = make()
            whole = InferenceEngine(model).generate(union_ids, union_mask, max_new_tokens=new, temperature=0)
            for pack in (True, False)[:1 + (ranks == 2)]:
                engine = InferenceEngine(model, tp_size=dist.get_world_size(), pack=pack)
                expect(engine.generate(ids, mask, max_new_tokens=new, temperature=0), whole, rank, ranks)


def four_ranks(rank, ranks):
    """Ragged responses; sampling; rank 0's seed; two groups that go their own way."""
    (ids, mask), (union_ids, union_mask, _) = prompts_of(rank), union(ranks)
    for name in ("opt", "llama", "llama-bias-tied", "codegen"):
        model = small_model(name)
        sampling = dict(max_new_tokens=R, temperature=0.9, top_p=0.95, eos_token_id=EOS, num_return_sequences=2)
        whole = InferenceEngine(model).generate(union_ids, union_mask, seed=7, **sampling)
        engine = InferenceEngine(model, tp_size=dist.get_world_size())
        rollout = engine.generate(ids, mask, seed=7 if rank == 0 else 1000 + rank, **sampling)
        expect(rollout, whole, rank, ranks, copies=2)
        assert engine.memory["kv cache"] > 0 and engine.cache is None

    # 2 x 2: each pair for itself, the first stops at once and the second goes on: nobody waits for anybody
    model, pair = small_model("llama"), rank // 2
    rollout = InferenceEngine(model, tp_size=2).generate(
        ids, mask, max_new_tokens=R, temperature=0, eos_token_id=list(range(101)) if pair == 0 else None)
    assert rollout.mask.size(1) == (1 if pair == 0 else R)
    alone = InferenceEngine(model).generate(ids, mask, max_new_tokens=R, temperature=0)
    assert torch.equal(rollout.tokens, alone.tokens[:, :rollout.tokens.size(1)])

    with pytest.raises(ValueError, match="5 heads"):
        InferenceEngine(small_model("bloom"), tp_size=dist.get_world_size()).generate(ids, mask, max_new_tokens=R)


def zero3_of(model):
    config = {"train_micro_batch_size_per_gpu": 1,
              "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
              "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}}
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    return engine


def shards(module):
    """This rank's share of every weight."""
    return {name: p.ds_tensor.clone() for name, p in module.named_parameters()}


def partitioned(module):
    return all(p.numel() == 0 for p in module.parameters())


def step(engine):
    ids, mask, _ = union(2)
    logits = engine(input_ids=ids.masked_fill(mask == 0, 0), attention_mask=mask).logits
    engine.backward(logits[:, -1].logsumexp(-1).mean())
    engine.step()


def zero3(rank, ranks):
    """
    ZeRO-3 against the plain model, alone and with tensor parallelism on top, with and without LoRA: the same tokens,
    responses of other lengths on every rank, and the weights after a rollout bit for bit what they were.
    """
    (ids, mask), (union_ids, union_mask, _) = prompts_of(rank), union(ranks)
    sampling = dict(max_new_tokens=R, eos_token_id=EOS)
    for name in SMALL if ranks == 2 else ADAPTED[-1:]:
        for make in variants(name):
            plain, engine = make(), zero3_of(make())
            assert partitioned(engine.module)
            before = shards(engine.module)
            own = InferenceEngine(plain).generate(ids, mask, seed=rank, **sampling)
            for pack in (True, False)[:1 + (name in ADAPTED)]:
                inference = InferenceEngine(engine.module, pack=pack)
                rollout = inference.generate(ids, mask, seed=rank, **sampling)
                assert torch.equal(rollout.tokens, own.tokens) and torch.equal(rollout.mask, own.mask)
                torch.testing.assert_close(rollout.logprobs, own.logprobs, atol=1e-4, rtol=0)
                assert inference.memory["weights aliased"] == 0
            whole = InferenceEngine(plain).generate(union_ids, union_mask, seed=3, **sampling)
            both = InferenceEngine(engine.module, tp_size=dist.get_world_size())
            expect(both.generate(ids, mask, seed=3, **sampling), whole, rank, ranks)
            assert partitioned(engine.module) and both.cache is None
            assert all(torch.equal(shard, before[name]) for name, shard in shards(engine.module).items())


def unsupported(rank, ranks):
    """ZeRO-3 through Hugging Face `generate`: the rank whose answers end first goes on gathering weights."""
    ids, mask = ragged_prompts(rows=3, length=6, seed=0)
    config = dict(LLAMA, head_dim=12, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    eos = list(range(101)) if rank == 0 else None

    def make():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING["gemma2"](**config), attn_implementation="eager")

    rollouts = [InferenceEngine(model).generate(ids, mask, max_new_tokens=R, temperature=0, eos_token_id=eos)
                for model in (make().eval(), zero3_of(make()).module)]
    assert rollouts[0].mask.size(1) == (1 if rank == 0 else R)
    assert torch.equal(rollouts[0].tokens, rollouts[1].tokens)
    torch.testing.assert_close(rollouts[0].logprobs, rollouts[1].logprobs, atol=1e-4, rtol=0)


@contextmanager
def failing(call):
    """sample() raises at its call-th call, on every rank: a rollout that runs out of memory, say."""
    sample, calls = hybrid_engine.sample, iter(range(1, 1000))

    def fail(*arguments, **options):
        if next(calls) == call:
            raise RuntimeError("in the middle")
        return sample(*arguments, **options)

    hybrid_engine.sample = fail
    try:
        with pytest.raises(RuntimeError, match="in the middle"):
            yield
    finally:
        hybrid_engine.sample = sample


def training_goes_on(rank, ranks):
    """
    Rollouts and an exception in the middle of one, between two training steps, change nothing about training; the next
    rollout is of the new weights.
    """
    ids, mask = prompts_of(rank)
    for change in (lambda model: model, lora):
        disturbed, quiet = (zero3_of(change(small_model("llama"))) for _ in range(2))
        inference = InferenceEngine(disturbed.module, tp_size=dist.get_world_size())
        step(disturbed), step(quiet)
        before = inference.generate(ids, mask, max_new_tokens=R, temperature=0)
        for call in (1, 4):
            with failing(call):
                inference.generate(ids, mask, max_new_tokens=R)
            assert partitioned(disturbed.module) and inference.cache is None
        step(disturbed), step(quiet)
        expected = shards(quiet.module)
        assert all(torch.equal(shard, expected[name]) for name, shard in shards(disturbed.module).items())
        after = inference.generate(ids, mask, max_new_tokens=R, temperature=0)
        assert (after.logprobs - before.logprobs).abs().max() > 1e-3


def in_turn(rank, ranks, cases):
    for case in cases:
        case(rank, ranks)


@pytest.mark.parametrize("ranks, cases", [(2, (families, zero3, unsupported, training_goes_on)),
                                          (4, (families, four_ranks, zero3))])
def test_ranks(ranks, cases):
    run_ranks(ranks, in_turn, cases)
