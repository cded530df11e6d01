"""
One decode step: InferenceEngine beside Hugging Face `generate`, and beside itself captured as a
CUDA graph; shapes of OPT-1.3B and Llama-3.2-1B, random weights, bf16.

    python bench/decode.py                 # about two minutes on a GPU; on a CPU toy shapes

A step reads every weight and the keys and values of all rows once, and does little with them, so
its floor is these bytes over the memory's bandwidth, which a large copy in the same run measures.
"share" is how much of that bandwidth the step reaches. A step of `generate`, ours or Hugging
Face's, is what more tokens take longer than few, so that prefill and set-up are not in it; sampling
is.

The graph is no part of the engine yet. `captured` is its decode loop with every tensor in place:
tokens, positions and column are written where they are read, so that a step can be recorded once
and replayed. It must give the very tokens of the engine.
"""

import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not bench/: its kernels.py would stand before kernels/
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from bench.generate import engine, hugging_face
from bench.kernels import limits
from hybrid_engine import InferenceEngine
from kernels.sampling import sample
from support.plan import attention_shape, opt_config

# The hub's config.json of Llama-3.2-1B.
LLAMA_1B = dict(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True,
    max_position_embeddings=131072,
    rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0,
                     "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192})
GPU = dict(
    models={"OPT-1.3B": lambda: opt_config("1.3b"),
            "Llama-3.2-1B": lambda: LlamaConfig(**LLAMA_1B)},
    dtype=torch.bfloat16, batches=(1, 8, 32, 128), prompt=336, few=16, many=80, repeats=3)
TOY = dict(
    models={"toy OPT": lambda: OPTConfig.from_json_file(ROOT / "configs" / "tiny.json"),
            "toy Llama": lambda: LlamaConfig(**{**LLAMA_1B, "hidden_size": 64, "vocab_size": 500,
                                                "intermediate_size": 128, "num_hidden_layers": 2,
                                                "num_attention_heads": 4, "num_key_value_heads": 2,
                                                "head_dim": 16})},
    dtype=torch.float32, batches=(1, 4), prompt=16, few=4, many=12, repeats=1)


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def step_seconds(generate, few, many, repeats):
    """generate(number of new tokens) -> seconds of one more, the median of the repeats."""
    generate(few)  # warms up: compiles, allocates
    found = []
    for _ in range(repeats):
        seconds = []
        for count in (few, many):
            synchronize()
            began = time.perf_counter()
            generate(count)
            synchronize()
            seconds.append(time.perf_counter() - began)
        found.append((seconds[1] - seconds[0]) / (many - few))
    return statistics.median(found)


def step_bytes(model, rows, length):
    """What a step must read: all weights but tables of which a row is looked up, and the cache."""
    config = model.config
    weights = sum(p.numel() for p in model.parameters())  # a tied embedding, once, is the head
    decoder = getattr(model.model, "decoder", model.model)
    for table in ("embed_positions", *([] if config.tie_word_embeddings else ["embed_tokens"])):
        if hasattr(decoder, table):
            weights -= getattr(decoder, table).weight.numel()
    _, kv_heads, head_dim = attention_shape(config)
    cache = 2 * config.num_hidden_layers * rows * kv_heads * length * head_dim
    return (weights + cache) * model.dtype.itemsize


@torch.inference_mode()
def captured(model, ids, mask, few, many, seed):
    """
    The engine's sampled rollout of `many` tokens, its steps replayed from one CUDA graph (on a CPU:
    called) -> tokens and logprobs (B, many), and the seconds of a step after the first `few`.
    """
    generator = InferenceEngine(model)
    B, P = ids.shape
    start = generator._starts(mask, many)
    noise = torch.Generator(ids.device).manual_seed(seed)
    uniforms = torch.rand(many, B, generator=noise, device=ids.device)

    # The state of the loop. Nothing of it moves: a graph knows addresses, not names.
    tokens = torch.zeros(B, dtype=torch.int64, device=ids.device)
    positions = P - start
    column = torch.tensor(P, device=ids.device)
    number = torch.tensor([0], device=ids.device)  # of the token to be sampled
    all_tokens = torch.zeros(many, B, dtype=torch.int64, device=ids.device)
    all_logprobs = torch.zeros(many, B, device=ids.device)
    state = (tokens, positions, column, number)

    def choose(logits):
        new_tokens, logprobs = sample(logits, uniforms.index_select(0, number)[0])
        tokens.copy_(new_tokens)
        all_tokens.index_copy_(0, number, new_tokens[None])
        all_logprobs.index_copy_(0, number, logprobs[None])
        number.add_(1)

    with generator._rollout_memory(B, P + many) as (decoder, cache):

        def step():
            logits = decoder.step(tokens, positions, column, cache)
            positions.add_(1)
            column.add_(1)
            choose(logits)

        choose(decoder.prefill(ids.masked_fill(mask == 0, 0), start, cache, 1))
        if ids.is_cuda:
            # Steps before the recording, on a stream of their own, because what is compiled or
            # allocated at a first call cannot be recorded. Then everything is as it was.
            before = [tensor.clone() for tensor in state]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            for tensor, kept in zip(state, before):
                tensor.copy_(kept)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            step = graph.replay

        for _ in range(few - 1):
            step()
        synchronize()
        began = time.perf_counter()
        for _ in range(many - few):
            step()
        synchronize()
        seconds = (time.perf_counter() - began) / (many - few)
    return all_tokens.T, all_logprobs.T, seconds


def measure():
    """
    One dict for each shape and batch: shape, batch, engine, hugging_face and graph (seconds of a
    step), bytes (of one), bandwidth (bytes/s of a copy), equal (the share of the graph's tokens
    that are the engine's).
    """
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    setting = GPU if gpu else TOY
    few = setting["few"]
    many = setting["many"]
    bandwidth, _ = limits()
    for name, config in setting["models"].items():
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config(), dtype=setting["dtype"]).eval()
        for batch in setting["batches"]:
            ids = torch.randint(5, model.config.vocab_size, (batch, setting["prompt"]),
                                device=device)
            mask = torch.ones_like(ids)
            ours = step_seconds(lambda count: engine(model, ids, mask, count, 1.0),
                                few, many, setting["repeats"])
            theirs = step_seconds(lambda count: hugging_face(model, ids, mask, count, 1.0),
                                  few, many, 1)
            tokens, _, graph = captured(model, ids, mask, few, many, seed=0)
            expected = InferenceEngine(model).generate(ids, mask, max_new_tokens=many, seed=0,
                                                       eos_token_id=None)
            equal = (tokens == expected.tokens[:, ids.size(1):]).float().mean()
            length = setting["prompt"] + (few + many) / 2  # the mean over the timed steps
            yield dict(shape=name, batch=batch, engine=ours, hugging_face=theirs, graph=graph,
                       bytes=step_bytes(model, batch, length), bandwidth=bandwidth,
                       equal=float(equal))
        del model
        if gpu:
            torch.cuda.empty_cache()


def main():
    transformers.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU, toy shapes'}")
    print(f"{'shape':<14}{'batch':>6}{'HF ms':>9}{'engine ms':>11}{'share':>7}{'graph ms':>10}"
          f"{'share':>7}{'equal tokens':>14}")
    for row in measure():
        floor = row["bytes"] / row["bandwidth"]
        print(f"{row['shape']:<14}{row['batch']:>6}{row['hugging_face'] * 1e3:>9.2f}"
              f"{row['engine'] * 1e3:>11.3f}{floor / row['engine']:>7.2f}"
              f"{row['graph'] * 1e3:>10.3f}{floor / row['graph']:>7.2f}{row['equal']:>14.4f}",
              flush=True)


if __name__ == "__main__":
    main()
