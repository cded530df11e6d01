"""
--dry_run: the plan's bytes against counts by hand and published limits, its hours against
DeepSpeed-Chat's tables.
"""

import os
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING

import step3_ppo
from hybrid_engine import InferenceEngine
from support import dry_run, run_all
from support.flags import RunConfig, UsageError, parse_config
from support.dry_run import DEVICES, plan_stage, what_fits
from support.plan import Work, empty_model, epoch_hours, memory_plan, training_flops
from support.processes import CONFIGS

GB = 2**30
ROOT = Path(__file__).resolve().parent.parent


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
    plan, _ = memory_plan({"actor": model}, ds_config, 4, Work(1, 128, 64))
    found = [plan["actor"][part] / P for part in ("weights", "gradients", "optimizer")]
    assert found == pytest.approx([weights, gradients, optimizer])


def test_offload_moves_bytes_to_the_host():
    model = empty_model("opt-125m", RunConfig())
    P = sum(p.numel() for p in model.parameters())
    cpu = {"device": "cpu"}
    ds_config = settings(3, offload_optimizer=cpu, offload_param=cpu)
    plan, _ = memory_plan({"actor": model}, ds_config, 4, Work(1, 128, 64))
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
        plan, _ = memory_plan({"actor": model}, settings(dtype="fp32"), 1, Work(rows, tokens, 0))
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
    plan, moments = memory_plan(models, ds_config, 1, Work(8, 512, 256, 8, checkpointing=True))
    return (moments["train actor"].device + plan["actor"]["KV cache"]) / GB


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
        work = Work(rows, prompt + new, new, rows, cpu=True)
        plan, moments = memory_plan({"actor": model}, settings(dtype="fp32"), 1, work)
        actor = plan["actor"]
        copied = engine.memory["weights copied"]
        assert actor["KV cache"] == engine.memory["kv cache"]
        assert actor["generation copy"] == pytest.approx(copied, rel=0.02)
        held = actor["weights"] + actor["optimizer"]
        assert moments["generate"].device == held + actor["generation copy"] + actor["KV cache"]


def test_step_3_plans_without_reading_weights(model_folders, tmp_path, monkeypatch, capsys):
    """A folder of which only config.json is left, and a preset; nothing is written."""
    shutil.copy(Path(model_folders["lm"]) / "config.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    step3_ppo.main(parse_config(step3_ppo.Config, "", [
        "--actor_model_name_or_path", str(tmp_path),
        "--critic_model_name_or_path", "facebook/opt-350m",
        "--dry_run", "8", "--zero_stage", "3", "--device", "h100"]))
    out = capsys.readouterr().out
    for name in ("8 device(s)", "ZeRO 3", "actor", "ref", "reward", "critic", "generate",
                 "train critic", "fits", "h100 has 79.1 GB", "100 TFLOP/s", "$3"):
        assert name in out, (name, out)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


FULL_13B = ["--actor_model_name_or_path", "facebook/opt-13b",
            "--critic_model_name_or_path", "facebook/opt-350m",
            "--deepspeed_config", str(CONFIGS / "1node.json"), "--dry_run", "8", "--device", "a100-80"]


@pytest.mark.parametrize("flags, devices", [
    (FULL_13B, 8), (FULL_13B, 1), (FULL_13B + ["--per_device_train_batch_size", "64",
                                               "--per_device_generation_batch_size", "64"], 8),
    (FULL_13B + ["--actor_model_name_or_path", "facebook/opt-66b"], 8),
    (FULL_13B + ["--actor_model_name_or_path", "facebook/opt-175b"], 16),
    (FULL_13B + ["--device", "rtx4090", "--critic_model_name_or_path", "facebook/opt-13b"], 8)])
def test_what_is_proposed_fits_and_is_no_more_than_that(flags, devices):
    plan = plan_stage(parse_config(step3_ppo.Config, "", flags), "ppo", devices, cpu=False)
    assert not plan.fits and plan.peak > plan.device.memory * GB
    words = what_fits(plan)
    count, flag_words = re.fullmatch(
        r"(?:(\d+) devices(?: with )?)?(--.*?)? \(\d+\.\d GB\)", words).groups()
    count = int(count or devices)

    def fits(proposed, count=count):
        config = parse_config(step3_ppo.Config, "", flags + proposed)
        return plan_stage(config, "ppo", count, cpu=False).fits

    proposed = (flag_words or "").split()
    assert fits(proposed), words
    # Each flag with its value; those of one change go together.
    groups = re.findall(r"(--lora_dim.*--only_optimize_lora|--per_device_generation.*steps \d+|"
                        r"--per_device_train.*steps \d+|--\w+(?: \d+)?)", flag_words or "")
    assert "".join(groups).replace(" ", "") == (flag_words or "").replace(" ", "")
    for group in groups:
        fewer = [word for other in groups if other != group for word in other.split()]
        try:
            assert not fits(fewer), (words, group)
        except UsageError:
            pass  # without it the others do not go together
    if count > devices:
        assert count > 8 or devices == 1


@pytest.mark.parametrize("tp, devices", [(16, 8), (3, 3), (2, 3), (0, 8)])
def test_a_decoder_is_shared_by_ranks_that_divide_devices_and_heads(tp, devices):
    """OPT-13B has 40 heads."""
    with pytest.raises(UsageError, match=f"--inference_tp_size {tp}"):
        config = parse_config(step3_ppo.Config, "", FULL_13B + ["--inference_tp_size", str(tp)])
        plan_stage(config, "ppo", devices, cpu=False)


def test_every_device_of_the_flag_is_in_the_table():
    assert typing.get_type_hints(RunConfig)["device"] == typing.Literal["", *DEVICES]


def test_a_model_beyond_all_devices_is_said_to_be():
    flags = FULL_13B + ["--device", "rtx4090", "--actor_model_name_or_path", "facebook/opt-175b"]
    plan = plan_stage(parse_config(step3_ppo.Config, "", flags), "ppo", 1, cpu=False)
    assert what_fits(plan) == "a smaller model, or devices with more memory (--device)"


def test_processes_on_a_cpu_share_the_host_and_hold_what_is_the_hosts():
    flags = FULL_13B[:4] + ["--deepspeed_config", str(CONFIGS / "cpu.json"), "--enable_ema"]
    flags[1] = "facebook/opt-125m"
    config = parse_config(step3_ppo.Config, "", flags)
    one = plan_stage(config, "ppo", 1, cpu=True)
    two = plan_stage(config, "ppo", 2, cpu=True)
    assert two.device.memory == one.device.memory / 2
    assert one.host == 0 and not one.moments["train actor"].host
    plain = plan_stage(parse_config(step3_ppo.Config, "", flags[:-1]), "ppo", 1, cpu=True)
    P = sum(p.numel() for p in one.models["actor"].parameters())
    assert one.moments["EMA"].device - plain.moments["save"].device == 4 * P


@pytest.mark.parametrize("model, hardware, device, fits", [
    ("opt-13b", "1node", "a100-80", True), ("opt-66b", "multinode", "a100-80", True),
    ("llama-2-70b", "1node", "a100-80", False), ("opt-6.7b", "1gpu", "rtx4090", False)])
def test_run_all_plans_offline_and_refuses_what_does_not_fit(model, hardware, device, fits,
                                                              tmp_path):
    """No hostfile, no network, no data, none written; and the same three stages as in a run."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HOSTFILE": str(tmp_path / "none"),
                   "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", ROOT / "run_all.sh", model, hardware, "--dry_run", "--device",
                           device], cwd=tmp_path, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    text = done.stdout
    assert text.count("verdict   ") == 3 and "all three stages: " in text, text
    assert (done.returncode, "does not fit" in text) == ((0, False) if fits else (2, True)), text
    assert ("what does: " in text) == (not fits) and "100,000 rows" in text
    devices = {"1gpu": 1, "1node": 8, "multinode": 64}[hardware]
    assert text.count(f"GB on each of {devices} device(s)") == 3
    hours = [float(found) for found in re.findall(r"^time +([\d.]+) h", text, re.MULTILINE)]
    dollars = sum(float(found.replace(",", "")) for found in re.findall(r"; \$([\d.,]+) at", text))
    total, cost = re.search(r"all three stages: ([\d.]+) h, \$([\d.,]+)", text).groups()
    assert float(total) == pytest.approx(sum(hours), abs=0.02)
    assert float(cost.replace(",", "")) == pytest.approx(dollars, abs=0.02)
    assert sum(hours) * devices * DEVICES[device].price == pytest.approx(dollars, rel=0.02)
    assert not list(tmp_path.iterdir())


def test_run_all_holds_the_plan_against_this_machine(monkeypatch, capsys):
    """
    Before the first stage, with the shapes of the models that it starts from; a plan of stage 3
    alone that does not fit ends the run.
    """
    small = ["--data_path", "toy", "--max_steps", "2"]
    words = ["step1_sft", "--model_name_or_path", "tiny", *small, "--",
             "step2_reward", "--model_name_or_path", "output/sft", *small, "--",
             "step3_ppo", "--actor_model_name_or_path", "output/sft",
             "--critic_model_name_or_path", "output/reward", *small]
    monkeypatch.setattr("sys.argv", ["run_all"])
    run_all.check("cpu", words)
    peaks = re.search(r"memory plan: step1_sft ([\d.]+), step2_reward ([\d.]+), step3_ppo "
                      r"([\d.]+) of the [\d.]+ GB", capsys.readouterr().err).groups()
    largest = max(float(peaks[0]), float(peaks[1]))
    rollouts = ["--per_device_generation_batch_size", "4096"]
    monkeypatch.setattr(dry_run, "host_memory", lambda: largest + 0.2)
    run_all.check("cpu", words)
    with pytest.raises(SystemExit):
        run_all.check("cpu", words + rollouts)
    said = capsys.readouterr().err
    for part in ("run_all.sh: error: step3_ppo does not fit", "'generate'", "what does: ",
                 "--per_device_generation_batch_size 8", "start the stages by themselves"):
        assert part in said, (part, said)


@pytest.mark.parametrize("hardware, hostfile, asked, devices", [
    ("cpu", None, -1, 1), ("1gpu", None, -1, 1), ("1gpu", None, 4, 4), ("multinode", None, -1, 64),
    ("multinode", "a slots=8\n# b slots=8\nc slots=4 # slots=2\n", -1, 12)])
def test_devices_of_a_kind_of_hardware(hardware, hostfile, asked, devices, tmp_path, monkeypatch):
    monkeypatch.setenv("HOSTFILE", str(tmp_path / "hosts"))
    if hostfile:
        (tmp_path / "hosts").write_text(hostfile)
    assert run_all.devices_of(hardware, asked) == devices


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
    plans = [memory_plan(models, settings(), 1, Work(4, 512, 256, 4, text=text))[0]
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


@pytest.mark.parametrize("adapters", [False, True])
def test_with_zero_3_a_model_that_is_trained_whole_is_gathered_alone(adapters):
    """
    A frozen model beside the one that trains adds its share, 1/2 of its weights. Beside adapters it
    also stays gathered, because their step moves no frozen weight.
    """
    config = RunConfig(lora_dim=8, only_optimize_lora=True) if adapters else RunConfig()
    trained = empty_model("opt-125m", config)
    frozen = empty_model("opt-350m", RunConfig(), trained=False)
    work = Work(4, 128, 64, 8)
    _, alone = memory_plan({"actor": trained}, settings(stage=3), 2, work)
    _, beside = memory_plan({"actor": trained, "ref": frozen}, settings(stage=3), 2, work)
    more = beside["train actor"].device - alone["train actor"].device
    weights = 2 * sum(p.numel() for p in frozen.parameters())  # bf16
    assert more == pytest.approx(weights / 2 + (weights if adapters else 0))
