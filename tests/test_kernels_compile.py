"""
Every Triton kernel compiles for a Hopper GPU (sm_90), down to machine code, and needs no more
shared memory than a consumer card has. No GPU is needed, because Triton brings its own assembler.
The interpreter runs a kernel as Python and forgives what the compiler does not, such as a variable
that changes its type in a loop; the numbers are the interpreter's business, in test_kernel_*.py.
"""
import pytest

from kernels import (INTERPRETED, activation, decode_attention, logprob, norm, rotary, sampling,
                     triton)

pytestmark = pytest.mark.skipif(triton is None or INTERPRETED,
                                reason="no Triton, or its interpreter, which compiles nothing")

BF16, F32, I64 = "*bf16", "*fp32", "*i64"
ATTENTION = dict(q_ptr=BF16, k_ptr=BF16, v_ptr=BF16, start_ptr=I64, end_ptr=I64, slopes_ptr=F32,
                 part_ptr=F32, lse_ptr=F32, scale="fp32", D=80, BLOCK_D=128, BLOCK_T=64, BLOCK_G=16,
                 IN_FLOAT32=False)
ATTENTION_F32 = dict(ATTENTION, q_ptr=F32, k_ptr=F32, v_ptr=F32, SPLITS=2, HAS_ALIBI=False)
SAMPLE = dict(logits_ptr=BF16, uniform_ptr=F32, tokens_ptr=I64, logp_ptr=F32,
              inv_temperature="fp32", BLOCK_V=4096)
NORM = dict(x_ptr=BF16, residual_ptr=BF16, weight_ptr=BF16, bias_ptr=BF16, normed_ptr=BF16,
            sum_ptr=BF16, eps="fp32", HAS_RESIDUAL=True, BLOCK_C=1024)
ACT = dict(x_ptr=BF16, bias_ptr=BF16, up_ptr=BF16, out_ptr=BF16, BLOCK_F=1024)
ROTARY = dict(qkv_ptr=BF16, cos_ptr=BF16, sin_ptr=BF16, out_ptr=BF16, cache_ptr=BF16,
              column_ptr=I64, BLOCK_D=128)
LOGPROB = dict(logits_ptr=BF16, targets_ptr=I64, inv_temperature="fp32", BLOCK_V=4096)
CASES = [
    # module, kernel, what each argument is: a type (int32 where nothing is said) or a constant
    (logprob, "_logprob_fwd_kernel", dict(LOGPROB, state_ptr=F32)),
    (logprob, "_logprob_bwd_kernel", dict(LOGPROB, dlogp_ptr=F32, lse_ptr=F32, dlogits_ptr=BF16)),
    (sampling, "_sample_kernel", dict(SAMPLE, GREEDY=True)),
    (sampling, "_sample_kernel", dict(SAMPLE, GREEDY=False)),
    (norm, "_add_norm_kernel", dict(NORM, RMS=False, HAS_BIAS=True, PLUS_ONE=False)),
    (norm, "_add_norm_kernel", dict(NORM, RMS=True, HAS_BIAS=False, PLUS_ONE=True)),
    (activation, "_act_kernel", dict(ACT, NAME="relu", HAS_BIAS=True, GATED=False)),
    (activation, "_act_kernel", dict(ACT, NAME="gelu", HAS_BIAS=True, GATED=False)),
    (activation, "_act_kernel", dict(ACT, NAME="gelu_tanh", HAS_BIAS=False, GATED=True)),
    (activation, "_act_kernel", dict(ACT, NAME="silu", HAS_BIAS=False, GATED=True)),
    (rotary, "_rotary_cache_kernel", dict(ROTARY, INTERLEAVED=False)),
    (rotary, "_rotary_cache_kernel", dict(ROTARY, INTERLEAVED=True)),
    (decode_attention, "_decode_kernel", dict(ATTENTION, G=1, SPLITS=7, HAS_ALIBI=True)),
    (decode_attention, "_decode_kernel", dict(ATTENTION, G=8, SPLITS=1, HAS_ALIBI=False,
                                              part_ptr=BF16)),
    (decode_attention, "_decode_kernel", dict(ATTENTION_F32, G=1, BLOCK_T=32)),
    (decode_attention, "_decode_kernel", dict(ATTENTION_F32, G=32, BLOCK_G=32, D=256, BLOCK_D=256,
                                              BLOCK_T=16)),
    (decode_attention, "_combine_kernel", dict(part_ptr=F32, lse_ptr=F32, out_ptr=BF16, SPLITS=7,
                                               D=80, BLOCK_S=8, BLOCK_D=128)),
]


@pytest.mark.parametrize("module, name, arguments", CASES, ids=[name for _, name, _ in CASES])
def test_compiles_for_hopper(module, name, arguments):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    kernel = getattr(module, name)
    types = {n: a for n, a in arguments.items() if n[:1].islower()}
    constants = {n: a for n, a in arguments.items() if n not in types}
    signature = {n: types.get(n, "i32") for n in kernel.arg_names}
    signature.update(dict.fromkeys(constants, "constexpr"))
    # As a launch finds them, addresses and strides are multiples of 16. Loads are then fetched
    # ahead, into shared memory.
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names)
               if n.endswith("_ptr") or n.startswith("stride")}
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert len(compiled.asm["cubin"]) > 0
    assert compiled.metadata.shared <= 99 * 1024
    # A constant that float32 cannot hold (1e-38 is below its normal numbers) makes a kernel compute
    # in float64, which no consumer card does at speed.
    assert ".f64" not in compiled.asm["ptx"]


def test_every_kernel_is_compiled_here():
    modules = [activation, decode_attention, logprob, norm, rotary, sampling]
    launched = {(module.__name__, name) for module in modules for name in vars(module)
                if name.endswith("_kernel")}
    assert launched == {(module.__name__, name) for module, name, _ in CASES}
