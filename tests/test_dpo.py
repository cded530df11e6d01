"""
DPO: its loss and gradient against the formula in float64 over the Hugging Face model, EOS and padding included; then by
its command line, with whole models and with adapters, and what it leaves behind.
"""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import step2_reward
from data import Collator, MicroBatches
from hybrid_engine import train_step
from support.lora import WithoutAdapters, add_lora
from models import SMALL, small_model
from support.models import LanguageModel
from step2_reward import implicit_rewards, reward_loss
from test_losses import SPLITS, assert_same_step, make_engine, plain_step, row_nats, weights

PAIRS = [([5, 9, 7], [20, 31, 2], [8, 2]), ([40], [2], [41, 42, 43, 44, 2]),
         ([6, 11, 12], [13, 14, 2], [13, 15, 2]), ([90, 91], [92, 2], [93, 94, 95, 2])]


def items():
    array = lambda ids: torch.tensor(ids).int().numpy()
    return [{"chosen": array(prompt + better), "rejected": array(prompt + worse), "prompt_len": len(prompt)}
            for prompt, better, worse in PAIRS]


def margins(model, ref, beta):
    """
    beta (log pi / pi_ref of the chosen - of the rejected) a pair, by rows alone through Hugging Face's logits: Rafailov
    et al., eq. 7.
    """
    logp = lambda m, prompt, answer: -row_nats(m, prompt + answer, len(prompt))
    return [beta * (logp(model, p, a) - logp(ref, p, a).detach() - logp(model, p, b) + logp(ref, p, b).detach())
            for p, a, b in PAIRS]


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_dpo_step_is_the_formulas(make_model, settings, family):
    model, ref = make_model(family), make_model(family, seed=1)
    exact_ref = copy.deepcopy(ref).double()
    expected = plain_step(model, lambda m: -sum(F.logsigmoid(margin) for margin in margins(m, exact_ref, 0.3)) / 4)
    assert abs(expected[1] - math.log(2)) > 0.01
    for rows, parts in SPLITS:
        engine = make_engine(LanguageModel, model, settings, rows, parts, step2_reward.Config)
        batches = MicroBatches(Collator(2, pad_token_id=2), parts)(items())  # pad == EOS: the mask comes from lengths
        score = lambda batch: reward_loss(*implicit_rewards(engine, LanguageModel(ref), batch, 0.3))
        loss, norm = train_step(engine, batches, score, 4)
        assert_same_step((weights(engine), loss, norm), expected)


@pytest.mark.parametrize("name", SMALL)
def test_a_prompt_that_is_computed_once_gives_the_same(name):
    """One prompt is empty. Families with ALiBi, windows or attention of their own go without."""
    model, ref = small_model(name), small_model(name, seed=1)
    for hf in (model, ref):
        if hf.config.model_type not in ("bloom", "gpt_neo", "gptj", "codegen"):
            hf.set_attn_implementation("sdpa")
    policy = LanguageModel(model)
    assert policy.takes_any_mask == (model.config._attn_implementation == "sdpa" and name not in ("mistral", "qwen2"))
    batch = Collator(2, pad_token_id=2)([*items(), {**items()[0], "prompt_len": 0}])
    found = torch.cat(implicit_rewards(policy, LanguageModel(ref), batch, 0.1))
    found.sum().backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    policy.takes_any_mask = False
    expected = torch.cat(implicit_rewards(policy, LanguageModel(ref), batch, 0.1))
    expected.sum().backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for gradient, p in zip(gradients, model.parameters()):
        if gradient is not None:
            torch.testing.assert_close(gradient, p.grad, atol=1e-4, rtol=1e-4)


def test_the_untouched_model_has_loss_log_2(make_model, settings):
    model, batch = make_model("opt"), Collator(2, pad_token_id=2)(items())
    chosen, rejected = implicit_rewards(LanguageModel(model), LanguageModel(copy.deepcopy(model)), batch, 0.1)
    assert reward_loss(chosen, rejected).item() == pytest.approx(4 * math.log(2), rel=1e-6)
    assert torch.cat([chosen, rejected]).abs().max() < 1e-5


def test_the_eos_is_trained_and_the_prompt_is_not(make_model, settings):
    """The mask marks the answers' tokens, EOS included, and the likelihood of nothing else moves the loss."""
    batch = Collator(2, pad_token_id=2)(items())
    rows = zip(batch["input_ids"], batch["loss_mask"].bool())
    assert ([ids[mask].tolist() for ids, mask in rows]
            == [better for _, better, _ in PAIRS] + [worse for _, _, worse in PAIRS])
    # of a model that says how likely each given token was
    logits = torch.zeros(batch["input_ids"].shape).requires_grad_()

    def model(ids, attention_mask, mask):
        return logits[:, 1:] * mask, None

    reward_loss(*implicit_rewards(model, lambda ids, attention_mask, mask: (torch.zeros_like(mask), None),
                                  batch, 0.1)).backward()
    assert torch.equal(logits.grad != 0, batch["loss_mask"].bool())


def test_without_a_copy_the_reference_is_the_model_without_its_adapters(make_model, settings):
    config = step2_reward.Config(lora_dim=2, only_optimize_lora=True)
    model, batch = make_model("opt"), Collator(2, pad_token_id=2)(items())
    adapted = LanguageModel(add_lora(copy.deepcopy(model), config))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    found = implicit_rewards(adapted, WithoutAdapters(adapted), batch, 0.1)
    expected = implicit_rewards(adapted, LanguageModel(model), batch, 0.1)
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), atol=1e-5, rtol=0)
    assert torch.cat(found).abs().max() > 1e-2


@pytest.mark.parametrize("lora", [False, True])
def test_dpo_by_its_flags(model_folders, settings, tmp_path, lora):
    """
    From the first step's log 2; saves output/actor, in which the preferred answers are likelier than before and the
    others less so.
    """
    rows = [{"prompt": f"What is {i}?", "chosen": "It is a number.", "rejected": "Go away."} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    step2_reward.main(step2_reward.Config(
        model_name_or_path=model_folders["lm"], data_path=[str(tmp_path / "pairs.jsonl")],
        output_dir=str(tmp_path / "output"), dpo=True, max_seq_len=64, max_prompt_seq_len=32, max_answer_seq_len=8,
        max_steps=8, learning_rate=1e-2, lr_scheduler_type="constant", per_device_train_batch_size=4,
        deepspeed_config=str(step2_reward.__file__).replace("step2_reward.py", "configs/cpu.json"), lora_dim=2 * lora,
        only_optimize_lora=lora))
    lines = [json.loads(line) for line in (tmp_path / "output/actor/metrics.jsonl").read_text().splitlines()]
    assert (lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
            and lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-5))
    last = lines[-1]
    assert last["rewards/accuracies"] == 1 and last["rewards/margins"] > 0.1 and last["loss"] < 0.6
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"])
    summary = json.loads((tmp_path / "output/summary.json").read_text())
    assert (summary["dpo"]["accuracy"] == 1 and "reward" not in summary
            and (tmp_path / "output/actor/run_config.json").exists())
    assert (tmp_path / "output/actor/adapter").exists() == lora and not (tmp_path / "output/reward").exists()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "output/actor", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not hasattr(model.config, "score_mean")
