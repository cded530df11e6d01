"""
A run that diverges ends at that step, in one sentence, before it saves: the older model, its
checkpoints and the JSON of the log stay as they are. And in every dtype and ZeRO stage that is
accepted the first step moves the weights by the learning rate.
"""

import copy
import json
import math
import types

import pytest
import torch

import step1_sft
import step2_reward
import step3_ppo
from hybrid_engine import train_engine, train_step
from support.flags import UsageError
from support.log import MetricsLog
from support.metrics import check_finite
from support.models import LanguageModel
from support.processes import deepspeed_settings, setup
from ranks import run_ranks

SIZES = dict(per_device_train_batch_size=4, max_seq_len=64, max_prompt_seq_len=32,
             max_answer_seq_len=8, max_steps=30, lr_scheduler_type="constant", logging_steps=100,
             data_split="1,1,1")


@pytest.fixture
def place(model_folders, tmp_path):
    """Pairs, and an earlier run's models where the stages write theirs."""
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No."}
            for i in range(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = dict(SIZES, data_path=[str(tmp_path / "pairs.jsonl")], output_dir=str(tmp_path / "out"))
    return types.SimpleNamespace(folder=tmp_path / "out", flags=flags, models=model_folders)


def assert_nothing_is_lost(folder):
    """The log is JSON, and neither a model nor a checkpoint holds a NaN."""
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    for file in folder.glob("checkpoint-*/model/*model_states.pt"):
        weights = torch.load(file, weights_only=False)["module"]
        assert all(value.isfinite().all() for value in weights.values()), file
    assert not (folder / "run_config.json").exists()
    assert not (folder / ".saving").exists()


def test_sft_that_diverges(place, process_group):
    config = step1_sft.Config(model_name_or_path=place.models["lm"], learning_rate=1e18,
                              save_steps=1, **place.flags)
    with pytest.raises(UsageError, match="(?s)step .*no finite number.* diverged.*lower learning rate"):
        step1_sft.main(config)
    assert not (place.folder / "sft/model.safetensors").exists()
    assert_nothing_is_lost(place.folder / "sft")


@pytest.mark.parametrize("dpo", [False, True])
def test_pairs_that_diverge(place, process_group, dpo):
    start = place.models["lm" if dpo else "reward"]
    config = step2_reward.Config(model_name_or_path=start, learning_rate=1e18, dpo=dpo,
                                 save_steps=1, **place.flags)
    with pytest.raises(UsageError, match="diverged"):
        step2_reward.main(config)
    folder = place.folder / ("actor" if dpo else "reward")
    assert not (folder / "model.safetensors").exists()
    assert_nothing_is_lost(folder)


@pytest.mark.parametrize("rate", [dict(actor_learning_rate=1e18), dict(critic_learning_rate=1e18)])
def test_ppo_that_diverges(place, process_group, rate):
    """The actor's NaN shows when it samples next, the critic's in its loss."""
    config = step3_ppo.Config(actor_model_name_or_path=place.models["lm"],
                              critic_model_name_or_path=place.models["reward"],
                              per_device_generation_batch_size=4, skip_preflight=True, **rate,
                              **place.flags)
    with pytest.raises(UsageError, match="no numbers|diverged|no finite"):
        step3_ppo.main(config)
    assert not (place.folder / "actor/model.safetensors").exists()
    assert_nothing_is_lost(place.folder / "actor")


def one_rank_is_broken(rank, ranks):
    """One rank's loss is NaN; the sum over ranks, which is logged, ends both."""
    log = MetricsLog("log", 3, 1, [("loss", "loss", "5.2f")]) if rank == 0 else MetricsLog("log", 3, 1, [])
    loss = torch.tensor(math.nan if rank == 1 else 1.0)
    torch.distributed.all_reduce(loss)
    with pytest.raises(UsageError, match="step 2: loss is nan"):
        log(2, {"loss": loss.item()})


def test_all_ranks_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_ranks(2, one_rank_is_broken)
    assert (tmp_path / "log/metrics.jsonl").read_text() == ""


def test_what_is_finite_passes():
    check_finite("step 1", {"loss": 1.0, "grad_norm": None, "eval/gold": 0.0, "steps": 3})
    with pytest.raises(UsageError, match="step 1: grad_norm is inf"):
        check_finite("step 1", {"loss": 1.0, "grad_norm": math.inf})


def test_fp16_without_zero_is_refused(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({"fp16": {"enabled": True}}))
    config = step1_sft.Config(deepspeed_config=str(tmp_path / "ds.json"))
    with pytest.raises(UsageError, match="fp16 without ZeRO .*--zero_stage 1"):
        deepspeed_settings(config)
    config.zero_stage = 1
    assert deepspeed_settings(config)["fp16"]["enabled"]


CASES = [(dtype, stage) for dtype in ("fp32", "bf16", "fp16") for stage in (0, 1, 2, 3)
         if (dtype, stage) != ("fp16", 0)]


@pytest.mark.parametrize("dtype, stage", CASES)
def test_the_first_step_moves_the_weights_by_the_learning_rate(
        dtype, stage, make_model, tmp_path, monkeypatch, process_group):
    """Adam's first step is lr g / (|g| + eps): about the learning rate where gradients are large."""
    from deepspeed.accelerator import get_accelerator
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    monkeypatch.setattr(get_accelerator(), "supported_dtypes",
                        lambda: [torch.float32, torch.bfloat16, torch.float16])
    options = {"zero_optimization": {"stage": stage}}
    if dtype != "fp32":
        options[dtype] = {"enabled": True}
    if dtype == "fp16":
        options["fp16"]["initial_scale_power"] = 16
    (tmp_path / "ds.json").write_text(json.dumps(options))
    rate = 2.0**-7
    config = step1_sft.Config(deepspeed_config=str(tmp_path / "ds.json"),
                              lr_scheduler_type="constant", per_device_train_batch_size=2)
    ds_config = setup(config)
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    model = LanguageModel(copy.deepcopy(make_model("opt")).to(torch_dtype))
    engine = train_engine(model, ds_config, config, rate, 10)

    def masters():
        import deepspeed
        found = {}
        for name, parameter in engine.module.named_parameters():
            weight = deepspeed.utils.safe_get_full_fp32_param(parameter)
            found[name] = (parameter if weight is None else weight).detach().float().clone()
        return found

    before = masters()
    ids = torch.randint(4, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    loss, norm = train_step(
        engine, [None], lambda _: -engine(ids, mask, mask[:, 1:])[0].sum(), 22)
    assert math.isfinite(loss) and norm > 0.01
    # The median of the weights that move at all; those of tokens that do not occur have no gradient.
    moved = torch.cat([(value - before[name]).abs().flatten() for name, value in masters().items()])
    moved = moved[moved > 0]
    assert moved.median().item() == pytest.approx(rate, rel=0.1)


def test_an_fp16_overflow_is_a_skipped_step(make_model, tmp_path, monkeypatch, process_group, capsys):
    from deepspeed.accelerator import get_accelerator
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    monkeypatch.setattr(get_accelerator(), "supported_dtypes",
                        lambda: [torch.float32, torch.bfloat16, torch.float16])
    options = {"fp16": {"enabled": True, "initial_scale_power": 32, "hysteresis": 1},
               "zero_optimization": {"stage": 1}}
    (tmp_path / "ds.json").write_text(json.dumps(options))
    config = step1_sft.Config(deepspeed_config=str(tmp_path / "ds.json"),
                              per_device_train_batch_size=2)
    ds_config = setup(config)
    model = LanguageModel(copy.deepcopy(make_model("opt")).half())
    engine = train_engine(model, ds_config, config, 1e-3, 10)
    ids = torch.randint(4, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    loss, norm = train_step(engine, [None], lambda _: -engine(ids, mask, mask[:, 1:])[0].sum(), 22)
    assert math.isfinite(loss) and norm is None
    assert "fp16 overflow: this step is skipped (1 so far)" in capsys.readouterr().out
