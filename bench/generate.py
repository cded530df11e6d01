"""
Tokens per second of `InferenceEngine` beside Hugging Face `generate`, on random weights (speed is the same on any).

    OMP_NUM_THREADS=2 python bench/generate.py                # about 2 minutes on 2 CPU cores
    OMP_NUM_THREADS=2 python bench/generate.py --only tiny --repeats 9

Each row of the table: the same prompts, the contestants in alternating order, the median of the repeats. Responses have
full length, but in the ragged row: geometric lengths, a quarter of the maximum as mean.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not bench/: its kernels.py would stand before kernels/
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM


from hybrid_engine import InferenceEngine


def tiny():
    return OPTForCausalLM(OPTConfig.from_json_file(ROOT / "configs" / "tiny.json")).eval()


def opt(width, layers, heads, vocabulary, dtype):
    config = OPTConfig(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                       ffn_dim=4 * width, word_embed_proj_dim=width, max_position_embeddings=2048)
    return OPTForCausalLM(config).to(dtype).eval()


def llama(width, layers, heads, kv_heads, vocabulary, dtype):
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                         num_key_value_heads=kv_heads, intermediate_size=8 * width // 3)
    return LlamaForCausalLM(config).to(dtype).eval()


# name -> model, batch, prompt, response
SHAPES = {
    "tiny": (tiny, 64, 20, 24),
    "opt-125m": (lambda: opt(768, 12, 12, 50272, torch.bfloat16), 16, 128, 128),
    "opt-125m-fp32": (lambda: opt(768, 12, 12, 50272, torch.float32), 16, 128, 128),
    "llama-gqa": (lambda: llama(768, 12, 12, 4, 32000, torch.bfloat16), 16, 128, 128),
}
DEFAULT = ["tiny", "opt-125m"]


def hugging_face(model, ids, mask, R, temperature):
    sampling = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    options = sampling if temperature else dict(do_sample=False)
    model.generate(ids, attention_mask=mask, max_new_tokens=R, eos_token_id=None, pad_token_id=1, **options)


def engine(model, ids, mask, R, temperature, **options):
    InferenceEngine(model, **options).generate(ids, mask, max_new_tokens=R, temperature=temperature,
                                                  eos_token_id=None)


def ragged(model, ids, mask, R, **options):
    """EOS is every token id below 4 V / R: at random weights a step ends a row with probability about 4 / R."""
    V = model.config.vocab_size
    return InferenceEngine(model, **options).generate(ids, mask, max_new_tokens=R, eos_token_id=list(range(4 * V // R)))


def medians(contestants, repeats):
    seconds = {name: [] for name in contestants}
    for i in range(repeats + 1):
        for name in list(contestants)[::1 if i % 2 else -1]:
            began = time.perf_counter()
            contestants[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(s[1:]) for name, s in seconds.items()}  # the first of each warms up


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", choices=SHAPES, default=DEFAULT)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else (
        f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, "
        f"load {os.getloadavg()[0]:.1f}")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {machine}")
    print(f"{'shape':<16}{'mode':<22}{'engine s':>10}{'other s':>10}{'tokens/s':>10}{'ratio':>8}")
    for shape in args.only:
        build, B, P, R = SHAPES[shape]
        torch.manual_seed(0)
        model = build().to(device)
        ids = torch.randint(5, model.config.vocab_size, (B, P), device=device)
        mask = torch.ones_like(ids)
        mask[::2, :P // 4] = 0  # half of the prompts are shorter
        line = lambda mode, ours, other: print(f"{shape:<16}{mode:<22}{ours:>10.3f}{other:>10.3f}{B * R / ours:>10.0f}"
                                               f"{other / ours:>8.2f}", flush=True)
        for temperature, mode in ((0.0, "greedy, vs HF"), (1.0, "sampled, vs HF")):
            t = medians({"engine": lambda: engine(model, ids, mask, R, temperature),
                         "hf": lambda: hugging_face(model, ids, mask, R, temperature)}, args.repeats)
            line(mode, t["engine"], t["hf"])
        t = medians({"engine": lambda: engine(model, ids, mask, R, 1.0),
                     "plain": lambda: engine(model, ids, mask, R, 1.0, pack=False)}, args.repeats)
        line("sampled, vs pack=False", t["engine"], t["plain"])
        ids, mask = ids.repeat(64 // B, 1), mask.repeat(64 // B, 1)  # 64: with few rows the weights are the cost
        t = medians({"compact": lambda: ragged(model, ids, mask, R),
                     "whole": lambda: ragged(model, ids, mask, R, compact=False)}, args.repeats)
        rows = ragged(model, ids, mask, R).mask.sum(1)
        line(f"ragged {rows.mean():.0f}/{rows.max():.0f}, vs whole", t["compact"], t["whole"])


if __name__ == "__main__":
    main()
