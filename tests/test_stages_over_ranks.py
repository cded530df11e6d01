"""
The three stages with two real processes, ZeRO-3 and tensor-parallel rollouts, against one process at the same global
batch: the same data, losses, gradients, rollouts, metrics and saved weights.
"""

import json
from dataclasses import dataclass
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

import step1_sft
import step2_reward
import step3_ppo
from data import load_tokenizer
from support.toy import toy_rows
from hybrid_engine import ExponentialMovingAverage, train_engine, train_step
from support.flags import RunConfig
from support.models import LanguageModel, load_model
from support.processes import setup
from ranks import run_ranks
from test_ppo import small_models


@dataclass
class Config(RunConfig):
    pass


def inputs(folder):
    """
    Small OPT and Llama models, toy data in a file, and ZeRO settings under which even the smallest weight is sharded.
    """
    tokenizer = load_tokenizer("tiny")
    for kind in ("opt", "llama"):
        (folder / kind).mkdir()
        small_models(kind, folder / kind, tokenizer)
        many_ends = GenerationConfig(eos_token_id=list(range(0, 1000, 7)))  # so that answers end, at all lengths
        many_ends.save_pretrained(folder / kind / "actor")
    rows = [json.dumps({"prompt": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]})
            for row in toy_rows()[:400] if row["rejected"]]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    zero = {"stage3_param_persistence_threshold": 0}
    (folder / "ds.json").write_text(json.dumps({"gradient_clipping": 1.0, "zero_optimization": zero}))


def train(rank, ranks, folder):
    """
    Every stage as its command line would run it -> output folders in folder/1 or folder/2, by the number of ranks.
    """
    common = dict(data_path=[f"{folder}/rows.jsonl"], deepspeed_config=f"{folder}/ds.json", zero_stage=3 * (ranks > 1),
                  max_steps=2, lr_scheduler_type="constant", max_eval_samples=4, max_seq_len=96, max_prompt_seq_len=80,
                  max_answer_seq_len=10, per_device_train_batch_size=4 // ranks, gradient_accumulation_steps=2)
    sft = dict(common, learning_rate=1e-3)
    # the likeliest token only: with sampling, rows draw other noise in another order
    ppo = dict(common, actor_learning_rate=1e-3, critic_learning_rate=1e-3, per_device_generation_batch_size=8 // ranks,
               top_p=1e-6, ppo_epochs=2, kl_target=1.0, inference_tp_size=ranks)
    lora = dict(lora_dim=2, only_optimize_lora=True, gradient_checkpointing=True)
    text = dict(unsupervised_data_path=[f"{folder}/rows.jsonl"], unsup_coef=0.5)
    for kind, options in (("opt", dict(enable_ema=True, eval_steps=1, **text)), ("llama", lora)):
        actor, reward, out = f"{folder}/{kind}/actor", f"{folder}/{kind}/reward", f"{folder}/{ranks}/{kind}"
        step1_sft.main(step1_sft.Config(model_name_or_path=actor, output_dir=out, **sft))
        step2_reward.main(step2_reward.Config(model_name_or_path=reward, output_dir=out, **sft))
        step2_reward.main(step2_reward.Config(model_name_or_path=actor, output_dir=f"{out}/dpo", dpo=True, **sft))
        with mock.patch("torch.nn.init.kaiming_uniform_", spread):  # loading a model draws another number of numbers
            step3_ppo.main(step3_ppo.Config(output_dir=out, actor_model_name_or_path=actor,
                                            critic_model_name_or_path=reward, **options, **ppo))
    if ranks == 2:
        loading(folder, Config(zero_stage=3, deepspeed_config=f"{folder}/ds.json"))


def spread(parameter, **_):
    """LoRA's first A, the same whatever was drawn before."""
    return parameter.data.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).sin().view_as(parameter))


def loading(folder, config):
    """What ZeRO-3 does otherwise while a model is loaded: random weights, a new head, a larger vocabulary."""
    settings, tokenizer = setup(config), load_tokenizer("tiny")
    tiny = load_model("tiny", tokenizer, settings, 64)
    with deepspeed.zero.GatheredParameters(list(tiny.parameters())):
        layer = tiny.model.decoder.layers[1]
        assert (layer.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
                and layer.final_layer_norm.weight.min() == 1)

    tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<b>", "<c>"]})
    old = load_file(folder / "opt/actor/model.safetensors")["model.decoder.embed_tokens.weight"]
    model = load_model(f"{folder}/opt/actor", tokenizer, settings, 64)
    engine = train_engine(LanguageModel(model), settings, config, 1e-3, 1)
    with deepspeed.zero.GatheredParameters([model.get_input_embeddings().weight]):
        new = model.get_input_embeddings().weight.clone()
    assert new.shape == (len(tokenizer), 32) and torch.equal(new[:len(old)], old) and new.isfinite().all()
    assert engine.module.model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ids = torch.full((2, 6), len(tokenizer) - 1)
    assert engine(ids, torch.ones_like(ids), torch.ones_like(ids)[:, 1:])[0].isfinite().all()

    head = load_model(f"{folder}/llama/actor", tokenizer, settings, 64, head="score", allow_new_head=True).score.weight
    with deepspeed.zero.GatheredParameters([head]):
        assert head.shape == (1, 32) and 0.3 < head.std() * 33 ** 0.5 < 3  # N(0, 1 / (d + 1))


# -----------------------------------------------------------------------------
# the moving average

def averaging(rank, ranks, folder):
    """
    At every ZeRO stage, in both dtypes: after n updates, d^n w_0 + sum_k (1 - d) d^(n - k) w_k of
    the float32 weights. Shares of three ranks are uneven.
    """
    for stage in range(4):
        for dtype in ("float32", "bfloat16"):
            averaging_at(rank, folder, stage, dtype)


def averaging_at(rank, folder, stage, dtype):
    case = f"ZeRO {stage}, {dtype}"
    config = Config(zero_stage=stage, deepspeed_config=f"{folder}/{dtype}.json",
                    lr_scheduler_type="constant")
    ds_config = setup(config)
    model = load_model(f"{folder}/opt/actor", load_tokenizer("tiny"), ds_config, 64)
    engine = train_engine(LanguageModel(model), ds_config, config, 1e-2, 10)
    average = ExponentialMovingAverage(engine, decay=0.9)
    newest = ExponentialMovingAverage(engine, decay=0.0)
    ids = torch.randint(4, 900, (2, 8), generator=torch.Generator().manual_seed(rank))
    history = [newest.by_name()]
    for _ in range(3):
        train_step(engine, [ids], lambda ids: nats_of(engine, ids), 28)
        average.update()
        newest.update()
        history.append(newest.by_name())

    # by_name leaves the weights as they are.
    before = [weight.detach().clone() for weight in average._own_weights()]
    averages = average.by_name()
    same_bits(average._own_weights(), before)

    # The averages are rank 0's, and those of the weights that the model is made of.
    names = {name for name, _ in model.named_parameters()}
    assert set(averages) == (names if rank == 0 else set()), case
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        for name, parameter in model.named_parameters():
            if rank == 0:
                close = dict(atol=1e-6, rtol=0) if dtype == "float32" else dict(atol=0, rtol=5e-3)
                torch.testing.assert_close(history[3][name], parameter.float(), **close)
    moved = 0
    for name, found in averages.items():
        w = [weights[name] for weights in history]
        expected = 0.9**3 * w[0] + sum(0.1 * 0.9 ** (3 - k) * w[k] for k in (1, 2, 3))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0,
                                   msg=lambda m: f"{case}, {name}: {m}")
        moved = max(moved, (w[3] - w[0]).abs().max())
    assert moved > 1e-3 or rank, case

    # A resumed run takes the averages over, and not the weights of then.
    everyones = [averages]
    dist.broadcast_object_list(everyones)
    resumed = ExponentialMovingAverage(engine, decay=0.9)
    resumed.load(everyones[0])
    again = resumed.by_name()
    assert all(torch.equal(again[name], averages[name]) for name in averages), case
    same_bits(average._own_weights(), before)


def same_bits(weights, before):
    """ZeRO 3's padding is memory that nobody has written, and may hold NaN."""
    for weight, expected in zip(weights, before, strict=True):
        torch.testing.assert_close(weight, expected, atol=0, rtol=0, equal_nan=True)


def nats_of(engine, ids):
    logprobs, _ = engine(ids, torch.ones_like(ids), torch.ones(2, 7))
    return -logprobs.sum()


def test_the_moving_average_is_its_closed_form(tmp_path, process_group):
    small_models("opt", tmp_path / "opt", load_tokenizer("tiny"))
    for dtype in ("float32", "bfloat16"):
        settings = {"bf16": {"enabled": dtype == "bfloat16"}, "gradient_clipping": 1.0}
        (tmp_path / f"{dtype}.json").write_text(json.dumps(settings))
    run_ranks(3, averaging, str(tmp_path))


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items()
             if not name.startswith(("time/", "tokens_per_second", "memory"))} for line in lines]


def test_two_ranks_train_as_one_does(tmp_path, process_group):
    inputs(tmp_path)
    train(0, 1, tmp_path)
    run_ranks(2, train, tmp_path)
    for kind in ("opt", "llama"):
        one, two = tmp_path / "1" / kind, tmp_path / "2" / kind
        for name in ("sft", "reward", "dpo/actor", "actor"):
            for expected, line in zip(metrics(one / name), metrics(two / name), strict=True):
                assert line == pytest.approx(expected, rel=1e-4, abs=1e-4), (kind, name)
        assert 2 < metrics(one / "actor")[0]["response/length"] < 10  # ragged
        memory = [json.loads((folder / "actor/metrics.jsonl").read_text().splitlines()[0]) for folder in (one, two)]
        assert memory[1]["memory/weights_aliased_gb"] == 0 < memory[0]["memory/weights_aliased_gb"]
        # as many rows on both ranks, each with half of the heads
        whole, half = (m["memory/kv_cache_gb"] for m in memory)
        assert half == whole / 2
        for section, numbers in json.loads((one / "summary.json").read_text()).items():
            if section in ("sft", "reward", "ppo"):
                same = {name: value for name, value in numbers.items() if name != "seconds"}
                found = json.loads((two / "summary.json").read_text())[section]
                assert found == pytest.approx({**same, "seconds": found["seconds"]}, rel=1e-3,
                                              abs=1e-3), (kind, section)
        assert (kind == "opt") == ("ppo/loss/ptx" in metrics(one / "actor")[0])
        for name in ("sft", "reward", "dpo/actor", "actor", "critic") + ("actor_ema",) * (kind == "opt"):
            weights = [load_file(folder / name / "model.safetensors") for folder in (one, two)]
            torch.testing.assert_close(weights[1], weights[0], atol=1e-4, rtol=0)
            start = load_file(tmp_path / kind / ("reward" if name in ("reward", "critic") else "actor")
                              / "model.safetensors")
            assert weights[0].keys() == start.keys()  # a tied head is not saved beside its embedding, averaged or not
            moved = max((weights[0][key] - start[key]).abs().max() for key in start)
            assert moved > (1e-5 if name == "actor_ema" else 1e-3), (kind, name)

    peft = pytest.importorskip("peft")
    ids = torch.arange(24).view(2, 12) + 10
    for name, start, auto in (("actor", "actor", AutoModelForCausalLM),
                              ("critic", "reward", AutoModelForSequenceClassification)):
        base = auto.from_pretrained(tmp_path / "llama" / start)
        before = base(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, two / name / "adapter")(ids).logits
        torch.testing.assert_close(adapted, auto.from_pretrained(two / name)(ids).logits, atol=1e-5, rtol=1e-5)
        assert (adapted - before).abs().max() > 1e-3
