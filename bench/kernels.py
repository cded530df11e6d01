"""
Each op of kernels/ against its definition in PyTorch, beside what this machine can do at all.

    python bench/kernels.py                  all ops on the GPU, or without one the CPU forms (a
                                             minute or two)
    python bench/kernels.py norm sampling    some of them

Prints medians of repeated runs. GB/s counts the bytes that the op must move (inputs once, outputs
once), so a form that moves more shows a lower number; TFLOP/s counts the matmuls of the definition.
"of limit" holds that against a large copy or a large matmul timed in the same run; a CPU whose
caches hold the data passes its copy. On a GPU the table is also written to bench/results/. Run the
tests first: a wrong kernel can be as fast as it likes.
"""
import json
import multiprocessing
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from kernels import (activation, decode_attention, logprob, norm, rotary, sampling,  # noqa: E402
                     triton)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16


def seconds(*forms, budget=1.0):
    """
    Median time of one call of each form, in seconds, the forms taking turns so that a busy machine
    is busy for all of them. On a GPU each call is timed by events, after a write that empties the
    L2 cache.
    """
    times = [[] for _ in forms]
    for fn in forms * 2:
        fn()
    if DEVICE == "cpu":
        stop = time.perf_counter() + budget * len(forms)
        while len(times[0]) < 5 or time.perf_counter() < stop:
            for fn, took in zip(forms, times):
                begin = time.perf_counter()
                fn()
                took.append(time.perf_counter() - begin)
        return [statistics.median(took) for took in times]
    scratch = torch.empty(2**28, dtype=torch.int8, device=DEVICE)
    for _ in range(30):
        for fn, took in zip(forms, times):
            begin = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            scratch.zero_()
            begin.record()
            fn()
            end.record()
            took.append((begin, end))
    torch.cuda.synchronize()
    return [statistics.median(begin.elapsed_time(end) / 1e3 for begin, end in took)
            for took in times]


def limits():
    """Bytes/s of a large copy (read + write) and FLOP/s of a large matmul."""
    a = torch.ones(2**30 if DEVICE == "cuda" else 2**27, dtype=torch.int8, device=DEVICE)
    b = torch.empty_like(a)
    n = 8192 if DEVICE == "cuda" else 2048
    m = torch.randn(n, n, device=DEVICE, dtype=DTYPE)
    copy, matmul = seconds(lambda: b.copy_(a), lambda: m @ m)
    return 2 * a.numel() / copy, 2 * n**3 / matmul


def randn(*shape, dtype=DTYPE):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def integers(high, *shape):
    return torch.randint(high, shape, device=DEVICE)


def size(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def with_grad(fn, leaf, *args):
    def run():
        leaf.grad = None
        out = fn(leaf, *args)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
    return run


# Each yields (what, new form, definition, bytes that must move, matmul FLOP): the shapes of a
# rollout of OPT-125M on a CPU, of OPT-1.3B on a GPU.

GPU = DEVICE == "cuda"
B, H, D, T = (32, 32, 64, 1024) if GPU else (16, 12, 64, 256)
C, N, V = H * D, 4096 if GPU else 512, 50272


def bench_logprob():
    logits = randn(N, V)
    targets = integers(V, N)
    yield (f"token_logprobs ({N}, {V})", lambda: logprob.token_logprobs(logits, targets),
           lambda: logprob.token_logprobs_reference(logits, targets), size(logits), 0)
    logits.requires_grad_(True)
    yield ("  with backward", with_grad(logprob.token_logprobs, logits, targets),
           with_grad(logprob.token_logprobs_reference, logits, targets), 3 * size(logits), 0)
    del logits
    hidden = randn(N, C).requires_grad_(True)
    weight = (0.02 * randn(V, C)).requires_grad_(True)
    flop = 2 * N * V * C
    with torch.no_grad():
        yield (f"linear_logprobs ({N}, {C}) x {V}",
               lambda: logprob.linear_logprobs(hidden, weight, targets),
               lambda: logprob.linear_logprobs_reference(hidden, weight, targets), 0, flop)
    yield ("  with backward", with_grad(logprob.linear_logprobs, hidden, weight, targets),
           with_grad(logprob.linear_logprobs_reference, hidden, weight, targets), 0, 3 * flop)


def peak_memory(name):
    """
    MB that forward and backward of an OPT-125M head on 1,024 tokens need at once, the weight's
    gradient included.
    """
    def resident(field):
        status = pathlib.Path("/proc/self/status").read_text()
        return int(status.split(field + ":")[1].split()[0]) / 2**10

    hidden = randn(1024, 768).requires_grad_(True)
    weight = (0.02 * randn(V, 768)).requires_grad_(True)
    targets = integers(V, 1024)
    form = getattr(logprob, name)
    # the first call's workspaces are no part of it
    with_grad(form, hidden, weight[:8].detach(), targets % 8)()
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        # Linux forgets the high-water mark so far
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
    with_grad(form, hidden, weight, targets)()
    if GPU:
        return torch.cuda.max_memory_allocated() / 2**20 - before
    return resident("VmHWM") - before


def print_peaks():
    """Each form in a process of its own, because memory that one has freed may serve the other."""
    if not GPU and not pathlib.Path("/proc/self/clear_refs").exists():
        return
    names = ("linear_logprobs", "linear_logprobs_reference")
    processes = multiprocessing.get_context("spawn")
    ours, plain = (processes.Pool(1).apply(peak_memory, (name,)) for name in names)
    print(f"\nlinear_logprobs (1024, 768) x {V} with backward, peak memory: {ours:.0f} MB, "
          f"definition {plain:.0f} MB, ratio {ours / plain:.2f}")


def bench_sampling():
    logits = randn(B, V, dtype=torch.float32)
    # a peaked distribution, as trained models have: under top-p few tokens of it are kept
    peaked = -1.5 * torch.arange(1, V + 1, device=DEVICE).log()[torch.randperm(V, device=DEVICE)]
    uniform = torch.rand(B, device=DEVICE)
    every = ({}, dict(temperature=0), dict(temperature=0.7), dict(top_k=50), dict(top_p=0.9),
             dict(temperature=0.7, top_k=50, top_p=0.9))
    kinds = ((logits, ""), (logits.to(DTYPE), " bf16"), (peaked.repeat(B, 1), " peaked"))
    for x, kind in kinds:
        for options in every:
            named = ", ".join(f"{k}={v}" for k, v in options.items())
            yield (f"sample ({B}, {V}){kind} {named}",
                   lambda: sampling.sample(x, uniform, **options),
                   lambda: sampling.sample_reference(x, uniform, **options), size(x), 0)
    yield (f"sample ({B}, {V}) against multinomial", lambda: sampling.sample(logits, uniform),
           lambda: torch.multinomial(logits.softmax(-1), 1), size(logits), 0)


def bench_norm():
    x, r, w, b = randn(B, C), randn(B, C), randn(C), randn(C)
    yield (f"add_layer_norm ({B}, {C})", lambda: norm.add_layer_norm(x, r, w, b, 1e-5),
           lambda: norm.add_layer_norm_reference(x, r, w, b, 1e-5), 4 * size(x), 0)
    yield (f"add_rms_norm ({B}, {C})", lambda: norm.add_rms_norm(x, r, w, 1e-5),
           lambda: norm.add_rms_norm_reference(x, r, w, 1e-5), 4 * size(x), 0)


def bench_activation():
    x, bias = randn(B, 4 * C), randn(4 * C)
    for name in activation.FORMS:
        yield (f"act {name} ({B}, {4 * C})", lambda: activation.act(x, name, bias),
               lambda: activation.act_reference(x, name, bias), 2 * size(x), 0)
    gate, up = randn(B, 8 * C).chunk(2, dim=-1)
    yield (f"gated_act silu ({B}, {8 * C})", lambda: activation.gated_act(gate, up, "silu"),
           lambda: activation.gated_act_reference(gate, up, "silu"), 3 * size(gate), 0)


def bench_rotary():
    qkv, cache = randn(B, 3 * H, D), randn(2, B, H, T, D)
    cos, sin = rotary.rotary_tables(torch.rand(D // 2, device=DEVICE), B)
    args = (qkv, cos, sin, cache, torch.tensor(T // 2, device=DEVICE))
    yield (f"rotary_cache ({B}, {H}, {D})", lambda: rotary.rotary_cache(*args),
           lambda: rotary.rotary_cache_reference(*args), 2 * size(qkv), 0)


def bench_decode_attention():
    shapes = [(1, H, H), (B, H, H), (B, H, H // 4), *([(128, H, H)] if GPU else [])]
    for batch, heads, kv_heads in shapes:
        q, caches = randn(batch, heads, D), randn(2, batch, kv_heads, T, D)
        start = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
        end = torch.tensor(T, device=DEVICE)
        args = (q, *caches, start, end, D**-0.5)
        moved = size(caches)
        named = f"({batch}, {heads} over {kv_heads}, {T}, {D})"
        sdpa = lambda: torch.nn.functional.scaled_dot_product_attention(
            q[:, :, None], *caches.repeat_interleave(heads // kv_heads, dim=2))
        yield (f"decode_attention {named}", lambda: decode_attention.decode_attention(*args),
               lambda: decode_attention.decode_attention_reference(*args), moved, 0)
        yield ("  against PyTorch's SDPA", lambda: decode_attention.decode_attention(*args), sdpa,
               moved, 0)


def machine():
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if GPU:
        chip = torch.cuda.get_device_name()
    elif cpuinfo.exists():
        chip = cpuinfo.read_text().split("model name\t: ")[-1].split("\n")[0]
    else:
        chip = platform.processor() or platform.machine()
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT,
                                capture_output=True, text=True).stdout
    return {"chip": chip, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "triton": getattr(triton, "__version__", None), "python": platform.python_version(),
            "dtype": str(DTYPE), "commit": commit.strip() or None}


OPS = {name[len("bench_"):]: fn for name, fn in globals().items() if name.startswith("bench_")}


def measure(ops, copy, matmul, budget=1.0):
    """
    One dict for each line of the table: op, definition_us, us, rate and of_limit.

    copy, matmul  what `limits` returned
    budget        seconds for each form, on a CPU
    """
    for op in ops:
        for what, new, definition, moved, flop in OPS[op]():
            ours, theirs = seconds(new, definition, budget=budget)
            rate = f"{flop / ours / 1e12:.2f} TFLOP/s" if flop else f"{moved / ours / 1e9:.1f} GB/s"
            share = flop / ours / matmul if flop else moved / ours / copy
            yield dict(op=what, definition_us=theirs * 1e6, us=ours * 1e6, rate=rate,
                       of_limit=share)


def main():
    unknown = set(sys.argv[1:]) - set(OPS)
    if unknown:
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; the ops are {', '.join(OPS)}")
    torch.manual_seed(0)
    about = machine()
    copy, matmul = limits()
    lines = [", ".join(f"{k} {v}" for k, v in about.items()),
             f"limits: copy {copy / 1e9:.0f} GB/s, matmul {matmul / 1e12:.2f} TFLOP/s", "",
             "| op | definition, us | this, us | times faster | rate | of limit |",
             "|---|---|---|---|---|---|"]
    print("\n".join(lines))
    rows = []
    for row in measure(sys.argv[1:] or OPS, copy, matmul):
        faster = row["definition_us"] / row["us"]
        times = f"{row['definition_us']:.1f} | {row['us']:.1f} | {faster:.2f}"
        lines.append(f"| {row['op']} | {times} | {row['rate']} | {row['of_limit']:.2f} |")
        print(lines[-1], flush=True)
        rows.append({**row, "op": row["op"].strip()})
    if "logprob" in (sys.argv[1:] or OPS):
        print_peaks()
    if GPU:
        folder = ROOT / "bench" / "results"
        folder.mkdir(parents=True, exist_ok=True)
        stem = "kernels-" + about["chip"].lower().replace(" ", "-")
        (folder / f"{stem}.md").write_text("\n".join(lines) + "\n")
        report = dict(machine=about, copy_bytes_per_s=copy, matmul_flop_per_s=matmul, ops=rows)
        (folder / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
