"""
--dry_run: the plan's bytes against counts by hand and published limits, its hours against
DeepSpeed-Chat's tables.
"""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING

import step3_ppo
from hybrid_engine import InferenceEngine
from support.flags import RunConfig, UsageError, parse_config
from support.plan import empty_model, epoch_hours, memory_plan, training_flops

GB = 2**30


def settings(stage=0, dtype="bf16", **zero):
    return {dtype: {"enabled": True}, "zero_optimization": {"stage": stage, **zero}}


@pytest.mark.parametrize("size, billions", [
    ("125m", 0.125), ("350m", 0.331), ("1.3b", 1.316), ("2.7b", 2.652), ("6.7b", 6.658),
    ("13b", 12.853), ("30b", 29.975), ("66b", 65.72), ("175b", 174.6)])
def test_the_table_of_opt_has_the_published_sizes(size, billions):
    """Parameters of the checkpoints on the hub; 175B: Zhang et al. 2022, which counts no biases."""
    model = empty_model(f"facebook/opt-{size}", RunConfig())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=4e-3)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("dtype, stage, weights, gradients, optimizer", [
    ("fp32", 0, 4, 4, 8), ("bf16", 0, 2, 2, 12), ("bf16", 1, 2, 2, 3), ("bf16", 2, 2, 0.5, 3),
    ("bf16", 3, 0.5, 0.5, 3)])
def test_bytes_a_parameter(dtype, stage, weights, gradients, optimizer):
    """Rajbhandari et al. 2020, figure 1, on 4 devices."""
    model = empty_model("opt-125m", RunConfig())
    P = sum(p.numel() for p in model.parameters())
    ds_config = settings(stage, dtype, reduce_bucket_size=0)
    plan, _ = memory_plan({"actor": model}, ds_config, 4, 1, 128, 64)
    found = [plan["actor"][part] / P for part in ("weights", "gradients", "optimizer")]
    assert found == pytest.approx([weights, gradients, optimizer])


def test_offload_moves_bytes_to_the_host():
    model = empty_model("opt-125m", RunConfig())
    P = sum(p.numel() for p in model.parameters())
    cpu = {"device": "cpu"}
    ds_config = settings(3, offload_optimizer=cpu, offload_param=cpu)
    plan, _ = memory_plan({"actor": model}, ds_config, 4, 1, 128, 64)
    assert plan["actor"]["weights"] == plan["actor"]["optimizer"] == 0
    # weights, AdamW, float32 gradients
    assert plan["actor"]["host"] / P == pytest.approx((2 + 12 + 4) / 4)


def test_activations_are_what_autograd_keeps():
    """
    The formula against the bytes of every tensor that a forward pass of OPT and of Llama saves for
    its backward.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM
    rows = 4
    tokens = 64
    common = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=64,
                  max_position_embeddings=128)
    opt = OPTConfig(ffn_dim=512, word_embed_proj_dim=128, dropout=0.0, **common)
    llama = LlamaConfig(intermediate_size=384, num_key_value_heads=2, **common)
    for model in (OPTForCausalLM(opt), LlamaForCausalLM(llama)):
        saved = {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes(), tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.base_model(torch.randint(64, (rows, tokens)))
        plan, _ = memory_plan({"actor": model}, settings(dtype="fp32"), 1, rows, tokens, 0)
        measured = sum(size for size, _ in saved.values())
        planned = plan["actor"]["activations"]
        assert planned == pytest.approx(measured, rel=0.05), model.config.model_type


def deepspeed_chat(size):
    """
    Peak GB of DeepSpeed-Chat's step 3 on one GPU, by its own recipe (single_gpu/run_6.7b_lora.sh):
    fp16 without ZeRO, LoRA 128 that freezes the matrices it adapts and nothing else, a whole
    reference model, an OPT-350M critic trained whole and checkpointed, 8 rows of 256 + 256. Its
    generation aliases all weights, but its KV cache stays.
    """
    plain = RunConfig()
    actor = empty_model(f"opt-{size}", RunConfig(lora_dim=128))
    for name, parameter in actor.named_parameters():
        parameter.requires_grad_(".base.weight" not in name)
    models = {"actor": actor, "ref": empty_model(f"opt-{size}", plain, trained=False),
              "reward": empty_model("opt-350m", plain, "score", trained=False),
              "critic": empty_model("opt-350m", plain, "score")}
    ds_config = settings(dtype="fp16")
    plan, peaks = memory_plan(models, ds_config, 1, 8, 512, 256, 8, checkpointing=True)
    return (peaks["train actor"] + plan["actor"]["KV cache"]) / GB


def test_the_largest_models_that_deepspeed_chat_publishes_for_one_gpu():
    """
    "Max model size on a single GPU", table 3 of its announcement (blogs/deepspeed-chat, April
    2023): 2.7B on 32 GB, 6.7B on 40 and 48, 13B on 80. Each fits within 15%, and the next larger of
    the family does not.
    """
    peak = {size: deepspeed_chat(size) for size in ("2.7b", "6.7b", "13b", "30b")}
    for gpu, largest, next_larger in ((32, "2.7b", "6.7b"), (40, "6.7b", "13b"),
                                      (48, "6.7b", "13b"), (80, "13b", "30b")):
        assert peak[largest] < 1.15 * gpu and peak[next_larger] > 1.15 * gpu, (gpu, peak)
    assert peak["13b"] == pytest.approx(80, rel=0.15), peak
    assert peak["6.7b"] == pytest.approx(40, rel=0.15), peak


@pytest.mark.parametrize("size, gpus, tflops, hours, dollars", [
    ("1.3b", 8, 43.4, 1.4, 45), ("6.7b", 8, 71.2, 4.1, 132), ("13b", 8, 67.1, 9, 290),
    ("30b", 8, 82.0, 18, 580), ("66b", 8, 67.8, 50.4, 1620), ("175b", 64, 52.8, 20, 5120)])
def test_hours_and_dollars_of_deepspeed_chat(size, gpus, tflops, hours, dollars):
    """
    Its tables 1 and 2 (an epoch of step 3 on A100-80GB, OPT-350M critic) from its figure 6
    (effective TFLOP/s a GPU) and BenckmarkSetting.md (264,292 prompts of 256 tokens, 256
    generated); $32 for 8 GPUs an hour. Checkpointing from 6.7B on.
    """
    models = {"actor": empty_model(f"opt-{size}", RunConfig()),
              "critic": empty_model("opt-350m", RunConfig(), "score")}
    found = epoch_hours(training_flops(models, 512, 256, size != "1.3b"), 264_292, gpus, tflops)
    assert found == pytest.approx(hours, rel=0.15)
    assert found * gpus * 4 == pytest.approx(dollars, rel=0.15)


@pytest.mark.parametrize("size, gpus, pairs_a_second, hours", [
    ("1.3b", 1, 4.85, 15.4), ("6.7b", 1, 0.9, 81.6), ("6.7b", 8, 13, 5.7), ("13b", 8, 6.8, 10.8),
    ("66b", 64, 10, 7.5)])
def test_hours_from_its_pairs_a_second(size, gpus, pairs_a_second, hours):
    """
    The same where figures 3, 4 and 7 state sequences a second (40 GB cards; 66B: 80 GB), turned
    into TFLOP/s a device by the usual 2 P a token.
    """
    models = {"actor": empty_model(f"opt-{size}", RunConfig()),
              "critic": empty_model("opt-350m", RunConfig(), "score")}
    P = {"1.3b": 1.3e9, "6.7b": 6.7e9, "13b": 13e9, "66b": 66e9}[size]
    P += 0.33e9 * 3 / 4  # the critic does not generate
    # 2 FLOP a parameter and token, 3 forwards and a generation
    tflops = pairs_a_second * 2 * 4 * 512 * P / gpus / 1e12
    found = epoch_hours(training_flops(models, 512, 256, False), 264_292, gpus, tflops)
    assert found == pytest.approx(hours, rel=0.15)


def test_generation_is_what_the_engine_counts(make_model):
    """
    A rollout's own accounting on a CPU; the norms and biases that the decoder fuses are not planned
    (under 2%).
    """
    rows, prompt, new = 3, 5, 4
    for family in ("opt", "llama"):
        model = make_model(family)
        engine = InferenceEngine(model)
        ids = torch.full((rows, prompt), 7)
        engine.generate(ids, torch.ones_like(ids), max_new_tokens=new)
        plan, peaks = memory_plan({"actor": model}, settings(dtype="fp32"), 1, rows, prompt + new,
                                  new, rows, cpu=True)
        actor = plan["actor"]
        copied = engine.memory["weights copied"]
        assert actor["KV cache"] == engine.memory["kv cache"]
        assert actor["generation copy"] == pytest.approx(copied, rel=0.02)
        held = actor["weights"] + actor["optimizer"]
        assert peaks["generate"] == held + actor["generation copy"] + actor["KV cache"]


def test_step_3_plans_without_reading_weights(model_folders, tmp_path, monkeypatch, capsys):
    """A folder of which only config.json is left, and a preset; nothing is written."""
    shutil.copy(Path(model_folders["lm"]) / "config.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    step3_ppo.main(parse_config(step3_ppo.Config, "", [
        "--actor_model_name_or_path", str(tmp_path),
        "--critic_model_name_or_path", "facebook/opt-350m",
        "--dry_run", "8", "--zero_stage", "3", "--device_tflops", "40", "--device_price", "2"]))
    out = capsys.readouterr().out
    for name in ("8 device(s)", "ZeRO stage 3", "actor", "ref", "reward", "critic", "generate",
                 "train critic", "at 40 TFLOP/s", "$2"):
        assert name in out, (name, out)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_epochs_over_a_rollout_and_mixed_in_text_are_planned():
    """
    Each epoch trains once more and generates no more; text is more tokens of the actor's backward.
    """
    models = {name: empty_model("facebook/opt-125m", RunConfig(), head)
              for name, head in (("actor", "lm"), ("critic", "score"))}
    once = training_flops(models, 512, 256, False)
    twice = training_flops(models, 512, 256, False, 2)
    mixed = training_flops(models, 512, 256, False, 1, 512)
    generated = training_flops(models, 512, 0, False) / once
    assert twice / once == pytest.approx(1 + generated)
    assert mixed - once == pytest.approx(training_flops({"actor": models["actor"]}, 512, 0, False))
    plans = [memory_plan(models, settings(), 1, 4, 512, 256, 4, text=text)[0]
             for text in (0, 512, 1024, 1536)]
    assert plans[1]["critic"] == plans[0]["critic"]
    none, one, two, three = (plan["actor"]["activations"] for plan in plans)
    assert three - two == two - one > 0  # from some text on, no more logits are kept at once
    assert one > none


def test_a_mixture_of_experts_is_refused(tmp_path):
    """
    Its experts' matrices are no linear layers: time and cost would come out many times too small.
    """
    CONFIG_MAPPING["mixtral"](
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=99).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="mixtures of experts"):
        empty_model(str(tmp_path), RunConfig())
