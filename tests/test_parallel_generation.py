"""
Tensor parallelism and ZeRO-3 with real processes (gloo, CPU) against one process on the same weights.

Each test spawns its ranks once and takes them through all its cases: starting Python is what costs the time.
"""

import os
import socket
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from hybrid_engine import InferenceEngine
from models import SMALL, ragged_prompts, small_model

R = 10
EOS = list(range(40, 55))


def _rank_main(rank, ranks, port, case, failures):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
                      WORLD_SIZE=str(ranks), DS_ACCELERATOR="cpu", DEEPSPEED_LOG_LEVEL="error")
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
        case(rank, ranks)
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        failures.put(f"rank {rank}\n{traceback.format_exc()}")
        os._exit(1)


def run_ranks(ranks, case):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    failures = context.SimpleQueue()
    processes = [context.Process(target=_rank_main, args=(rank, ranks, port, case, failures)) for rank in range(ranks)]
    [p.start() for p in processes]
    [p.join(100) for p in processes]
    hung = [rank for rank, p in enumerate(processes) if p.is_alive()]
    [p.kill() for p in processes]
    assert failures.empty(), failures.get()
    assert not hung, f"ranks {hung} hang"


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


def families_over_two_ranks(rank, ranks):
    (ids, mask), (union_ids, union_mask, _) = prompts_of(rank), union(ranks)
    for name in SMALL:
        heads = {"n_head": 6} if name == "bloom" else {}  # 5 heads cannot be halved
        model = small_model(name, **heads)
        for pack in (True, False):
            whole = InferenceEngine(model, pack=pack).generate(union_ids, union_mask, max_new_tokens=R, temperature=0)
            engine = InferenceEngine(model, tp_group=dist.group.WORLD, pack=pack)
            expect(engine.generate(ids, mask, max_new_tokens=R, temperature=0), whole, rank, ranks)


def four_ranks(rank, ranks):
    """Fewer key-value heads than ranks; ragged responses; sampling; rank 0's seed; two groups that go their own way."""
    (ids, mask), (union_ids, union_mask, _) = prompts_of(rank), union(ranks)
    for name in ("opt", "llama", "llama-bias-tied", "gpt_neox", "codegen"):  # llama: 2 key-value heads; tied: 1
        model = small_model(name, **({"num_attention_heads": 8, "hidden_size": 96} if name == "gpt_neox" else {}))
        sampling = dict(max_new_tokens=R, temperature=0.9, top_p=0.95, eos_token_id=EOS, num_return_sequences=2)
        whole = InferenceEngine(model).generate(union_ids, union_mask, seed=7, **sampling)
        engine = InferenceEngine(model, tp_group=dist.group.WORLD)
        rollout = engine.generate(ids, mask, seed=7 if rank == 0 else 1000 + rank, **sampling)
        expect(rollout, whole, rank, ranks, copies=2)
        assert engine.memory["kv cache"] > 0 and engine.cache is None

    # 2 x 2: each pair for itself, the first stops at once and the second goes on: nobody waits for anybody
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model, pair = small_model("llama"), rank // 2
    rollout = InferenceEngine(model, tp_group=pairs[pair]).generate(
        ids, mask, max_new_tokens=R, temperature=0, eos_token_id=list(range(101)) if pair == 0 else None)
    assert rollout.mask.size(1) == (1 if pair == 0 else R)
    alone = InferenceEngine(model).generate(ids, mask, max_new_tokens=R, temperature=0)
    assert torch.equal(rollout.tokens, alone.tokens[:, :rollout.tokens.size(1)])

    with pytest.raises(ValueError, match="5 heads"):
        InferenceEngine(small_model("bloom"), tp_group=dist.group.WORLD).generate(ids, mask, max_new_tokens=R)


def zero3_of(model):
    import deepspeed
    config = {"train_micro_batch_size_per_gpu": 1,
              "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
              "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


def zero3(rank, ranks):
    (ids, mask), (union_ids, union_mask, _) = prompts_of(rank), union(ranks)
    for name in ("opt", "opt-350m", "llama-bias-tied", "gpt2", "qwen3", "bloom"):
        heads = {"n_head": 6} if name == "bloom" else {}
        plain, engine = small_model(name, **heads), zero3_of(small_model(name, **heads))
        assert all(p.numel() == 0 for p in engine.module.parameters())  # partitioned
        own = InferenceEngine(plain).generate(ids, mask, max_new_tokens=R, seed=rank, eos_token_id=EOS)
        for pack in (True, False):
            inference = InferenceEngine(engine.module, pack=pack)
            rollout = inference.generate(ids, mask, max_new_tokens=R, seed=rank, eos_token_id=EOS)
            assert torch.equal(rollout.tokens, own.tokens) and torch.equal(rollout.mask, own.mask)
            torch.testing.assert_close(rollout.logprobs, own.logprobs, atol=1e-4, rtol=0)
            assert inference.memory["weights aliased"] == 0
            assert all(p.numel() == 0 for p in engine.module.parameters())  # and so again
        whole = InferenceEngine(plain).generate(union_ids, union_mask, max_new_tokens=R, seed=3, eos_token_id=EOS)
        both = InferenceEngine(engine.module, tp_group=dist.group.WORLD)
        expect(both.generate(ids, mask, max_new_tokens=R, seed=3, eos_token_id=EOS), whole, rank, ranks)

    # train a step, and the next rollout knows
    logits = engine(input_ids=union_ids, attention_mask=union_mask).logits
    engine.backward(logits[:, -1].logsumexp(-1).mean())
    engine.step()
    after = InferenceEngine(engine.module).generate(ids, mask, max_new_tokens=R, temperature=0)
    before = InferenceEngine(plain).generate(ids, mask, max_new_tokens=R, temperature=0)
    assert (after.logprobs - before.logprobs).abs().max() > 1e-3


@pytest.mark.parametrize("ranks, case", [(2, families_over_two_ranks), (4, four_ranks), (2, zero3)])
def test_ranks(ranks, case):
    run_ranks(ranks, case)
