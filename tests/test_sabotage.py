"""
Ways in which PPO fails without a word, one at a time, and the sentence of step 3 that names each:
the checks before the first update (preflight) or the doctor while it runs. The models are small and
really trained, by steps 1 and 2, on rows that they can learn in seconds.
"""

import json
import shutil
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file

import hybrid_engine
import step1_sft
import step2_reward
import step3_ppo
from support import models
from support.flags import UsageError

WORDS = "red blue green brown black white pink grey cold hot wet dry old new big small".split()
THINGS = ["house", "hat", "box", "cup", "bed", "map", "pen", "sky", "dog", "cat"]
NO_TURN = ("{% for m in messages %}{% if m.role == 'assistant' %}"
           "{{ '\\n\\nAssistant: ' + m.content + eos_token }}"
           "{% else %}{{ '\\n\\nHuman: ' + m.content }}{% endif %}{% endfor %}")
shape_rewards = step3_ppo.shape_rewards  # as it ships


@pytest.fixture(scope="module")
def flags(make_model, tokenizer, process_group, tmp_path_factory):
    """
    The flags of a healthy step 3 on models that steps 1 and 2 have trained: answers of two kinds,
    one of them preferred.
    """
    folder = tmp_path_factory.mktemp("sabotage")
    make_model("opt").save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    pairs = []
    shown = []
    for i, (word, thing) in enumerate(product(WORDS, THINGS)):
        pair = {"prompt": f"The {word} {thing}?", "chosen": f"The {thing} is {word}.",
                "rejected": f"It is {word} {word} {word}."}
        pairs.append(pair)
        answer = pair["rejected" if i % 5 < 3 else "chosen"]  # 40% are good
        shown.append({"prompt": pair["prompt"], "response": answer})
    for name, rows in (("shown", shown), ("pairs", pairs)):
        (folder / name).mkdir()
        train = [row for i, row in enumerate(rows) if i % 3]
        (folder / name / "train.json").write_text(json.dumps(train))
        (folder / name / "test.json").write_text(json.dumps(rows[::3]))
    common = dict(output_dir=str(folder), max_seq_len=64, max_prompt_seq_len=24,
                  max_answer_seq_len=16, logging_steps=20, seed=0)
    step1_sft.main(step1_sft.Config(
        data_path=[str(folder / "shown")], model_name_or_path=str(folder / "start"), max_steps=80,
        learning_rate=1e-2, data_split="1,0,0", per_device_train_batch_size=16, **common))
    common["data_path"] = [str(folder / "pairs")]
    step2_reward.main(step2_reward.Config(
        model_name_or_path=str(folder / "sft"), max_steps=15, learning_rate=3e-3,
        data_split="0,1,0", **common))
    return {**common, "actor_model_name_or_path": str(folder / "sft"),
            "critic_model_name_or_path": str(folder / "reward"), "data_split": "0,0,1",
            "per_device_generation_batch_size": 32, "per_device_train_batch_size": 8,
            "actor_learning_rate": 2e-3, "critic_learning_rate": 2e-3, "kl_coef": 0.2,
            "max_steps": 60}


def ppo(flags, folder, **changes):
    """Step 3 with those changes -> what the doctor said."""
    step3_ppo.main(step3_ppo.Config(**{**flags, "output_dir": str(folder), **changes}))
    return "\n".join(json.loads((folder / "summary.json").read_text())["doctor"])


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "actor/metrics.jsonl").read_text().splitlines()]


def test_a_healthy_run_learns_and_passes_in_silence(flags, tmp_path, capsys):
    """From 40% good answers to nearly all, at a few nats."""
    assert ppo(flags, tmp_path) == ""
    assert "preflight: 8 checks passed" in capsys.readouterr().out
    metrics = read_metrics(tmp_path)
    scores = [line["objective/scores"] for line in metrics]
    assert sum(scores[-5:]) / 5 > scores[0] + 0.5 and metrics[-1]["objective/kl"] < 5


def test_preflight_leaves_no_trace(flags, tmp_path):
    """The same numbers and weights, bit for bit, with and without it."""
    results = []
    for skip in (False, True):
        folder = tmp_path / str(skip)
        torch.manual_seed(0)
        ppo(flags, folder, skip_preflight=skip, max_steps=3)
        metrics = [{name: value for name, value in line.items()
                    if not name.startswith(("time", "memory", "tokens_per"))}
                   for line in read_metrics(folder)]
        weights = load_file(folder / "actor/model.safetensors")
        results.append((metrics, weights, torch.get_rng_state()))
    (metrics, weights, state), (plain_metrics, plain_weights, plain_state) = results
    assert metrics == plain_metrics and len(metrics) == 3
    assert all(torch.equal(weights[name], plain_weights[name]) for name in plain_weights)
    assert torch.equal(state, plain_state)


def test_preflight_knows_all_tokens_that_end_an_answer(flags, tmp_path, tokenizer, capsys):
    """An actor that ends by another token than the tokenizer's EOS, which generation_config names too."""
    actor = tmp_path / "actor_model"
    shutil.copytree(flags["actor_model_name_or_path"], actor)
    other = tokenizer.convert_tokens_to_ids("9")
    weights = load_file(actor / "model.safetensors")
    for tensor in weights.values():
        if tensor.ndim == 2 and len(tensor) >= len(tokenizer):
            tensor[[tokenizer.eos_token_id, other]] = tensor[[other, tokenizer.eos_token_id]]
    save_file(weights, actor / "model.safetensors", {"format": "pt"})
    settings = json.loads((actor / "generation_config.json").read_text())
    settings["eos_token_id"] = [tokenizer.eos_token_id, other]
    (actor / "generation_config.json").write_text(json.dumps(settings))
    ppo(flags, tmp_path, actor_model_name_or_path=str(actor))
    assert "preflight: 8 checks passed" in capsys.readouterr().out


def test_preflight_lets_the_rewards_be_changed(flags, tmp_path, monkeypatch, capsys):
    """A length penalty of 0.01 a token, where the KL penalty is."""
    def with_length_penalty(scores, logprobs, ref_logprobs, mask, kl_coef):
        rewards = shape_rewards(scores, logprobs, ref_logprobs, mask, kl_coef)
        return rewards - 0.01 * mask

    monkeypatch.setattr(step3_ppo, "shape_rewards", with_length_penalty)
    ppo(flags, tmp_path, max_steps=1)
    assert "preflight: 8 checks passed" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# stopped before the first update: each returns changes of the flags, after it broke one thing

def dropout_left_on(flags, folder, patch):
    patch(models, "disable_dropout", lambda config: None)
    shutil.copytree(flags["actor_model_name_or_path"], folder / "sft")
    config = json.loads((folder / "sft/config.json").read_text())
    # OPT's default, called as a function
    (folder / "sft/config.json").write_text(json.dumps({**config, "dropout": 0.1}))
    return {"actor_model_name_or_path": str(folder / "sft")}


def mask_without_eos(flags, folder, patch):
    generate = hybrid_engine.InferenceEngine.generate

    def short(self, *args, **kwargs):
        rollout = generate(self, *args, **kwargs)
        rollout.mask[:, :-1] = rollout.mask[:, 1:].clone()
        rollout.mask[:, -1] = 0
        rollout.mask[:, 0] = 1
        return rollout

    patch(hybrid_engine.InferenceEngine, "generate", short)
    return {}


def logprobs_of_the_token_before(flags, folder, patch):
    forward = models.LanguageModel.forward

    def shifted(self, ids, real, mask, temperature=1.0):
        return forward(self, ids.roll(1, 1), real, mask, temperature)

    patch(models.LanguageModel, "forward", shifted)
    return {}


def score_on_padding(flags, folder, patch):
    def changed(scores, logprobs, ref_logprobs, mask, kl_coef):
        rewards = shape_rewards(0 * scores, logprobs, ref_logprobs, mask, kl_coef)
        after = mask.sum(1).long().clamp(max=mask.size(1) - 1)
        return rewards.scatter_add(1, after[:, None], scores[:, None])

    patch(step3_ppo, "shape_rewards", changed)
    return {}


def score_on_every_token(flags, folder, patch):
    def changed(scores, logprobs, ref_logprobs, mask, kl_coef):
        rewards = shape_rewards(0 * scores, logprobs, ref_logprobs, mask, kl_coef)
        return rewards + scores[:, None] * mask

    patch(step3_ppo, "shape_rewards", changed)
    return {}


def score_twice(flags, folder, patch):
    def changed(scores, logprobs, ref_logprobs, mask, kl_coef):
        return shape_rewards(2 * scores, logprobs, ref_logprobs, mask, kl_coef)

    patch(step3_ppo, "shape_rewards", changed)
    return {}


def length_penalty_on_padding(flags, folder, patch):
    def changed(scores, logprobs, ref_logprobs, mask, kl_coef):
        return shape_rewards(scores, logprobs, ref_logprobs, mask, kl_coef) - 0.01

    patch(step3_ppo, "shape_rewards", changed)
    return {}


def no_assistant_turn(flags, folder, patch):
    return {"chat_template": NO_TURN}


def another_template_than_the_reward_models(flags, folder, patch):
    return {"chat_template": NO_TURN.replace("Human", "User")
            + "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"}


def reward_model_untrained(flags, folder, patch):
    config = {name: flags[name] for name in (
        "data_path", "max_seq_len", "max_prompt_seq_len", "max_answer_seq_len")}
    step2_reward.main(step2_reward.Config(
        model_name_or_path=flags["actor_model_name_or_path"], output_dir=str(folder), max_steps=1,
        learning_rate=0.0, **config))
    # a new head is as good as its negative
    if json.loads((folder / "summary.json").read_text())["reward"]["accuracy"] > 0.5:
        weights = load_file(folder / "reward/model.safetensors")
        weights["score.weight"] = -weights["score.weight"]
        save_file(weights, folder / "reward/model.safetensors", {"format": "pt"})
    return {"critic_model_name_or_path": str(folder / "reward")}


def eos_never_sampled(flags, folder, patch):
    sample = hybrid_engine.sample

    def without_eos(logits, *args, **options):
        return sample(logits.index_fill(1, torch.tensor([2]), -1e9), *args, **options)

    patch(hybrid_engine, "sample", without_eos)
    return {}


def other_ids(folder):
    """The tokenizer of a folder, all of whose words have other ids."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    # after the special tokens and the bytes
    words = {word: i for word, i in tokenizer["model"]["vocab"].items() if i >= 260}
    tokenizer["model"]["vocab"].update(zip(words, reversed(words.values())))
    path.write_text(json.dumps(tokenizer))


def reward_model_with_another_tokenizer(flags, folder, patch):
    shutil.copytree(flags["critic_model_name_or_path"], folder / "reward")
    other_ids(folder / "reward")
    return {"critic_model_name_or_path": str(folder / "reward")}


def wrong_tokenizer_everywhere(flags, folder, patch):
    for name in ("actor", "critic"):
        shutil.copytree(flags[f"{name}_model_name_or_path"], folder / name)
        other_ids(folder / name)
    return {"actor_model_name_or_path": str(folder / "actor"),
            "critic_model_name_or_path": str(folder / "critic")}


@pytest.mark.parametrize("sabotage, named", [
    (dropout_left_on, "dropout: .*set every dropout"),
    (mask_without_eos, "rewards: the response mask of .* answers does not end with their EOS"),
    (logprobs_of_the_token_before, "sampler: .*shift by one token"),
    (score_on_padding, "rewards: the scores of .* are not on their last token"),
    (score_on_every_token, "rewards: the scores of 32 of 32 answers are not on their last token"),
    (score_twice, "rewards: the scores of 32 of 32 answers are not on their last token"),
    (length_penalty_on_padding, "rewards: .* have rewards after their end"),
    (no_assistant_turn, "text: 32 of 32 prompts do not end .*--chat_template"),
    (another_template_than_the_reward_models,
     "text: .*reward has another chat template .*--chat_template"),
    (reward_model_untrained, "preference: .*is not trained for these data"),
    (eos_never_sampled, "ending: no rollout ended"),
    (reward_model_with_another_tokenizer, "its tokenizer has another vocabulary"),
    (wrong_tokenizer_everywhere, "ending: .*has the wrong tokenizer"),
], ids=lambda value: getattr(value, "__name__", ""))
def test_preflight_names(sabotage, named, flags, tmp_path, monkeypatch):
    changes = sabotage(flags, tmp_path, monkeypatch.setattr)
    with pytest.raises(UsageError, match=f"(?s){named}"):
        ppo(flags, tmp_path / "output", **changes)
    assert not (tmp_path / "output/actor").exists()  # nothing was trained


# -----------------------------------------------------------------------------
# named while it runs

def test_the_doctor_names_stale_log_probabilities(flags, tmp_path, monkeypatch):
    """
    Answers, and their log-probabilities, from the weights of the start: right before the first
    update, and further off after each.
    """
    generate_experience = step3_ppo.DeepSpeedPPOTrainer.generate_experience

    def stale(self, prompt_batch):
        self.models.generator.model = self.models.ref.model
        return generate_experience(self, prompt_batch)

    monkeypatch.setattr(step3_ppo.DeepSpeedPPOTrainer, "generate_experience", stale)
    assert "old log-probabilities are of an older policy" in ppo(flags, tmp_path, max_steps=10)


def test_the_doctor_names_a_learning_rate_100_times_too_high(flags, tmp_path):
    assert "--actor_learning_rate is too high" in ppo(
        flags, tmp_path, actor_learning_rate=100 * flags["actor_learning_rate"], max_steps=20)


def test_the_doctor_names_a_kl_coefficient_of_zero(flags, tmp_path):
    assert "--kl_coef is 0" in ppo(flags, tmp_path, kl_coef=0.0)
