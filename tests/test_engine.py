"""hybrid_engine.py around the decoder: models in and out, LoRA, averages, dropout."""
import types

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from data import load_tokenizer
from support import metrics
from support.flags import UsageError
from hybrid_engine import ExponentialMovingAverage, train_engine, train_step
from support.flags import RunConfig
from support.lora import LoRALinear, adapters_off, add_lora
from support.models import LanguageModel, RewardModel, load_model, save_model


class Config(RunConfig):
    pass


def opt(**changes):
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=1000, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
                       word_embed_proj_dim=32, max_position_embeddings=64, pad_token_id=3, **changes)
    return OPTForCausalLM(config)


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=1000, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def batch(rows=4, length=10):
    torch.manual_seed(1)
    ids = torch.randint(4, 500, (rows, length))
    return ids, torch.ones_like(ids)


def steps(engine, count=2):
    ids, mask = batch()
    for _ in range(count):
        train_step(engine, [ids], lambda ids: -engine(ids, mask, mask[:, 1:])[0].sum(), mask[:, 1:].sum())


@pytest.mark.parametrize("make", [opt, gpt2], ids=["opt", "gpt2"])
def test_lora_starts_as_the_plain_model_and_merges_exactly(make, process_group):
    model, (ids, _) = make().eval(), batch()
    plain = model(ids).logits
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    config = Config()
    config.lora_dim, config.only_optimize_lora = 4, True
    add_lora(model, config)
    torch.testing.assert_close(model(ids).logits, plain)
    for layer in (m for m in model.modules() if isinstance(m, LoRALinear)):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    adapted = model(ids).logits
    assert (adapted - plain).abs().max() > 1e-2
    with adapters_off(model):
        torch.testing.assert_close(model(ids).logits, plain)  # PPO's reference model
    merged = make().eval()
    for (name, layer), target in zip([(n, m) for n, m in model.named_modules() if isinstance(m, LoRALinear)],
                                     [m for m in merged.modules()
                                      if type(m).__name__ in ("Linear", "Conv1D") and m.weight.shape != (1000, 32)]):
        target.weight.data.copy_(layer.merged_weight())
    torch.testing.assert_close(merged(ids).logits, adapted, atol=1e-5, rtol=1e-5)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    for name, p in model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, frozen[name.replace(".base.", ".")])


@pytest.mark.parametrize("make", [opt, gpt2], ids=["opt", "gpt2"])
def test_a_lora_model_is_saved_merged(make, process_group, tmp_path):
    config = Config()
    config.lora_dim, config.only_optimize_lora, config.lr_scheduler_type = 4, True, "constant"
    engine = train_engine(LanguageModel(add_lora(make(), config)), process_group, config, 1e-2, 10)
    steps(engine)
    tokenizer = load_tokenizer("tiny")
    save_model(engine, tokenizer, tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids, _ = batch()
    torch.testing.assert_close(loaded.eval()(ids).logits, engine.module.model.eval()(ids).logits, atol=1e-5, rtol=1e-5)
    peft = pytest.importorskip("peft")
    adapted = peft.PeftModel.from_pretrained(make(), tmp_path / "out/adapter").eval()(ids).logits
    torch.testing.assert_close(adapted, loaded(ids).logits, atol=1e-5, rtol=1e-5)
    assert (adapted - make().eval()(ids).logits).abs().max() > 1e-3


def test_no_adapter_by_itself_where_the_rest_was_trained_too(process_group, tmp_path):
    config = Config()
    config.lora_dim = 4
    (tmp_path / "adapter").mkdir()  # an earlier run's
    save_model(train_engine(LanguageModel(add_lora(opt(), config)), process_group, config, 1e-2, 10),
               load_tokenizer("tiny"), tmp_path)
    assert (tmp_path / "model.safetensors").exists() and not (tmp_path / "adapter").exists()


def test_lora_names_layers_when_none_match(process_group):
    config = Config()
    config.lora_dim, config.lora_module_name = 4, "decoder.blocks."
    with pytest.raises(UsageError, match="decoder.blocks.*for example"):
        add_lora(opt(), config)


def test_adam_counts_from_one_in_bf16(process_group):
    """Its first step moves every weight by lr g / (|g| + eps); counted as the second, by 0.73 of that."""
    config, rate = Config(), 1e-3
    config.lr_scheduler_type = "constant"
    settings = {**process_group, "bf16": {"enabled": True}}
    engine = train_engine(LanguageModel(opt().bfloat16()), settings, config, rate, 10)
    masters = [weight for group in engine.optimizer.fp32_groups for weight in group]
    before = [weight.detach().clone() for weight in masters]
    steps(engine, 1)
    moved = torch.cat([(now - then).abs().flatten() for now, then in zip(masters, before)])
    assert 0.99 * rate < moved.max() < 1.001 * rate


def test_moving_average_is_its_closed_form(process_group):
    """After n updates: d^n w_0 + sum_k (1 - d) d^(n - k) w_k."""
    config = Config()
    config.lr_scheduler_type = "constant"
    engine = train_engine(LanguageModel(opt()), process_group, config, 1e-2, 10)
    weight = engine.module.model.model.decoder.layers[0].fc1.weight
    average, history = ExponentialMovingAverage(engine, decay=0.9), [weight.detach().clone()]
    for _ in range(3):
        steps(engine, 1)
        average.update()
        history.append(weight.detach().clone())
    expected = 0.9**3 * history[0] + sum(0.1 * 0.9 ** (3 - k) * history[k] for k in (1, 2, 3))
    torch.testing.assert_close(average.by_name()["model.decoder.layers.0.fc1.weight"], expected)
    assert (history[3] - history[0]).abs().max() > 1e-3


def test_moving_average_is_of_the_float32_masters(process_group):
    """In bf16 without ZeRO too, where the weights round small steps away and DeepSpeed's optimizer alone knows them."""
    config = Config()
    config.lr_scheduler_type = "constant"
    settings = {**process_group, "bf16": {"enabled": True}}
    engine = train_engine(LanguageModel(opt().bfloat16()), settings, config, 1e-3, 10)
    average = ExponentialMovingAverage(engine, decay=0.0)  # the newest weights
    steps(engine, 3)
    average.update()
    masters = {id(low): full for lows, fulls in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups)
               for low, full in zip(lows, fulls)}
    averages = average.by_name()
    for name, parameter in engine.module.model.named_parameters():
        assert torch.equal(averages[name], masters[id(parameter)]), name
    weight = engine.module.model.model.decoder.layers[0].fc1.weight
    assert not torch.equal(masters[id(weight)], weight.float())


def test_dropout_is_off_even_where_a_model_calls_it_as_a_function(process_group, tmp_path):
    """OPT keeps its dropout in floats and calls the function; only the config reaches it."""
    tokenizer = load_tokenizer("tiny")
    noisy = opt(dropout=0.5, attention_dropout=0.5, activation_dropout=0.5).train()
    ids, mask = batch()
    assert not torch.equal(noisy(ids).logits, noisy(ids).logits)
    noisy.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), tokenizer, process_group, 64).train()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model = LanguageModel(load_model(str(tmp_path), tokenizer, process_group, 64)).train()
    assert torch.equal(model(ids, mask, mask[:, 1:])[0], model(ids, mask, mask[:, 1:])[0])


def test_left_padding_changes_nothing(process_group):
    """Log-probabilities and values of a row are the same alone, left-padded, and padded on both sides."""
    from transformers import OPTForSequenceClassification
    for model in (LanguageModel(opt().eval()),
                  RewardModel(OPTForSequenceClassification(
                      OPTConfig(**{**opt().config.to_dict(), "num_labels": 1})).eval())):
        ids, mask = batch(1, 8)
        padded = torch.cat([torch.full((1, 3), 3), ids, torch.full((1, 2), 3)], 1)
        padded_mask = torch.cat([torch.zeros(1, 3), mask, torch.zeros(1, 2)], 1).long()
        if isinstance(model, LanguageModel):
            alone, inside = model(ids, mask, mask[:, 1:])[0], model(padded, padded_mask, padded_mask[:, 1:])[0][:, 3:10]
        else:
            alone, inside = model(ids, mask), model(padded, padded_mask)[:, 3:11]
        torch.testing.assert_close(inside[:, :alone.size(1)], alone, atol=1e-5, rtol=1e-5)


def test_an_interrupted_save_leaves_the_older_model(process_group, tmp_path, monkeypatch):
    engine = train_engine(LanguageModel(opt()), process_group, Config(), 1e-2, 10)
    tokenizer = load_tokenizer("tiny")
    save_model(engine, tokenizer, tmp_path / "out")
    before = (tmp_path / "out/model.safetensors").read_bytes()
    steps(engine)
    monkeypatch.setattr(type(tokenizer), "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UsageError, match="out: the model could not be saved .disk full.*--resume"):
        save_model(engine, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out/.saving").exists()
    assert (tmp_path / "out/model.safetensors").read_bytes() == before
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_language_model_is_no_reward_model_until_a_head_is_asked_for(process_group, tmp_path):
    """A language model is no reward model, and says so, unless a new head was asked for."""
    tokenizer = load_tokenizer("tiny")
    opt().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="no reward model"):
        load_model(str(tmp_path), tokenizer, process_group, 64, head="score")
    head = load_model(str(tmp_path), tokenizer, process_group, 64, head="score", allow_new_head=True).score.weight
    assert 0.3 < head.std() * 33 ** 0.5 < 3  # N(0, 1 / (d + 1))


@pytest.mark.parametrize("on", [True, False])
def test_gradient_checkpointing_recomputes_every_layer(process_group, model_folders, monkeypatch, on):
    """On a model as load_model brings it: in eval mode, in which Hugging Face's layers would keep all they compute."""
    calls, plain = [], transformers.modeling_utils.checkpoint
    monkeypatch.setattr(transformers.modeling_utils, "checkpoint", lambda *a, **k: (calls.append(1), plain(*a, **k))[1])
    config = Config(gradient_checkpointing=on)
    model = load_model(model_folders["lm"], load_tokenizer("tiny"), process_group, 64)
    steps(train_engine(LanguageModel(model), process_group, config, 1e-2, 10), count=1)
    assert len(calls) == 2 * on  # its layers


@pytest.mark.parametrize("heads, kv_heads, on_this_host, world, expected", [
    (64, 64, 8, 8, 8), (64, 8, 8, 64, 8), (40, 40, 16, 16, 8), (9, 3, 8, 8, 1), (12, 2, 8, 8, 4),
    (12, 2, 3, 3, 1), (6, 1, 6, 6, 6), (8, 8, 8, 12, 4), (None, None, 8, 8, 1)])
def test_a_decoder_is_shared_by_as_many_ranks_as_its_heads_allow(
        monkeypatch, heads, kv_heads, on_this_host, world, expected):
    """Under ZeRO 3; the number divides the heads, and those of keys and values or the other way."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(on_this_host))
    monkeypatch.setattr(metrics.dist, "get_world_size", lambda: world)
    weight = types.SimpleNamespace(ds_id=0)
    shape = types.SimpleNamespace(num_key_value_heads=kv_heads)
    if heads:
        shape.num_attention_heads = heads
    sharded = types.SimpleNamespace(config=shape, parameters=lambda: iter([weight]))
    assert metrics.decoder_ranks(sharded) == expected
    assert metrics.decoder_ranks(opt()) == 1
