"""
Models: Hugging Face folders in, Hugging Face folders out, and the two forms in which stages call
them.

    LanguageModel   (input_ids, attention_mask, mask) -> log-probabilities of given tokens, entropy
    RewardModel     (input_ids, attention_mask) -> one value a position
"""

import functools
import inspect
import math
import os
import shutil
from pathlib import Path

import deepspeed
import safetensors
import torch
import torch.nn as nn
import transformers
from deepspeed.accelerator import get_accelerator
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from kernels.decoder import FAMILIES
from kernels.logprob import linear_logprobs, token_logprobs
from support.flags import UsageError, check_local_path, first_line, is_out_of_memory
from support.lora import add_lora, save_adapter, split_lora_state
from support.processes import CONFIGS, compute_dtype, device, on_rank0, print0


# -----------------------------------------------------------------------------
# the two forms

class LanguageModel(nn.Module):
    """
    A Hugging Face causal LM that returns log-probabilities of given tokens, never the logits.

    vocabulary  ids below it exist, see vocabulary_size; None: all that the model has rows for
    """

    def __init__(self, model, vocabulary=None):
        super().__init__()
        self.model = model
        self.config = model.config
        self.vocabulary = vocabulary
        self.arguments = set(inspect.signature(model.forward).parameters)
        self.takes_any_mask = takes_any_mask(model)
        # In the decoder's families logits are hidden @ weight.T + bias and nothing else.
        self.plain_head = model.config.model_type in FAMILIES

    def forward(self, input_ids, attention_mask, mask, temperature=1.0):
        """
        input_ids, attention_mask  (B, T) int64, padded on either side or both; where the model
                                   takes_any_mask, also a mask (B, 1, T, T) bool of [query, key]
        mask                       (B, R), R < T: not zero on those of the last R tokens that are to
                                   be scored
        returns  logprobs  (B, R) float32, nats, of input_ids[:, -R:] given what precedes them, at
                           this temperature
                 entropy   (B, R) float32, nats, of the distributions they were drawn from,
                           detached, for logging
                 Both are zero where mask is zero: the head, often half of all work, is not applied
                 there.
        """
        R = mask.size(1)
        scored = mask.bool()
        inputs = dict(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        if "position_ids" in self.arguments:
            inputs["position_ids"] = position_ids(attention_mask)
        targets = input_ids[:, -R:][scored]

        # The hidden state at t predicts token t + 1, so those of the columns before are taken.
        if self.plain_head:
            hidden = self.model.base_model(**inputs)[0][:, -R - 1:-1]
            head = self.model.get_output_embeddings()
            weight = head.weight[:self.vocabulary]
            bias = None if head.bias is None else head.bias[:self.vocabulary]
            logprobs, entropy = linear_logprobs(
                hidden[scored], weight, targets, bias, temperature)
        else:
            logits = self.model(**inputs, logits_to_keep=R + 1).logits[..., :self.vocabulary]
            logits = logits[:, -R - 1:-1][scored] / temperature
            logprobs = token_logprobs(logits, targets)
            entropy = entropy_of(logits)

        zeros = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        return zeros.masked_scatter(scored, logprobs), zeros.masked_scatter(scored, entropy)


@torch.no_grad()
def entropy_of(logits):
    """logits (N, V) -> (N,) nats; 256 rows at a time, because it takes several float32 copies."""
    parts = [torch.distributions.Categorical(logits=part.float()).entropy()
             for part in logits.split(256)]
    return torch.cat(parts)


class RewardModel(nn.Module):
    """
    A Hugging Face sequence classification model, read at every position: the critic needs V(s_t)
    for all t, the reward model the last. The saved folder is the inner model's, so that
    AutoModelForSequenceClassification gives the same score.

    normalise  values are (score - score_mean) / score_std, with the numbers that step 2 left in
               config.json
    """

    def __init__(self, model, normalise=False):
        super().__init__()
        self.model = model
        self.config = model.config
        self.mean = 0.0
        self.std = 1.0
        if normalise:
            self.mean = getattr(model.config, "score_mean", 0.0)
            self.std = getattr(model.config, "score_std", 1.0)
            for number in (self.mean, self.std):
                if not isinstance(number, (int, float)) or not math.isfinite(number):
                    raise UsageError(f"{model.config.name_or_path}: score_mean {self.mean!r} and "
                                     f"score_std {self.std!r} in its config.json; both must be "
                                     "finite numbers, as step2_reward.py writes them.")
            self.std = max(self.std, 1e-6)
        self.trunk_arguments = set(inspect.signature(model.base_model.forward).parameters)
        self.takes_any_mask = takes_any_mask(model)

    def forward(self, input_ids, attention_mask):
        """
        (B, T), padded on either side or both, or with a mask as LanguageModel's -> values (B, T)
        float32, one a position.
        """
        inputs = dict(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        if "position_ids" in self.trunk_arguments:
            inputs["position_ids"] = position_ids(attention_mask)
        hidden = self.model.base_model(**inputs)[0]
        scores = self.model.score(hidden).squeeze(-1).float()
        return (scores - self.mean) / self.std


def vocabulary_size(tokenizer):
    """
    Ids below this number exist. Embeddings are often wider, for speed, and their other rows take no
    part in any distribution: not in training, and not in sampling, where an id that no tokenizer
    knows would come out.
    """
    return max(tokenizer.get_vocab().values()) + 1


def position_ids(attention_mask):
    """
    (B, T) or (B, 1, T, T) mask -> (B, T): how many tokens precede a real one, so left padding
    changes nothing.
    """
    if attention_mask.ndim == 4:
        return (attention_mask[:, 0].sum(-1) - 1).clamp(min=0)
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def takes_any_mask(model):
    """
    Whether a Hugging Face model computes with a mask (B, 1, T, T): of the families whose attention
    is known, those in which it neither counts positions by itself (ALiBi) nor has windows.
    """
    config = model.config
    return (config.model_type in FAMILIES and config._attn_implementation == "sdpa"
            and not getattr(config, "sliding_window", None)
            and "position_ids" in inspect.signature(model.base_model.forward).parameters)


def last_token(values, attention_mask):
    """values, mask (B, T) -> (B,): the value at each row's last real token, wherever padding is."""
    columns = torch.arange(values.size(1), device=values.device)
    last = (attention_mask * columns).argmax(-1)
    return values.gather(1, last[:, None]).squeeze(1)


def parameter_count(model):
    # ds_numel, because ZeRO 3 leaves empty shells behind
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


# -----------------------------------------------------------------------------
# in

@functools.cache
def say_once(line):
    """Prints a line, because PPO loads the same folder twice."""
    print0(line)


def load_language_model(name_or_path, tokenizer, ds_config, tokens, lora_config=None):
    """
    -> LanguageModel. See load_model.

    lora_config  a RunConfig: adapters where it has --lora_dim
    """
    model = load_model(name_or_path, tokenizer, ds_config, tokens)
    if lora_config is not None:
        model = add_lora(model, lora_config)
    say_once(f"{name_or_path}: language model, {parameter_count(model) / 1e6:.1f}M parameters")
    return LanguageModel(model, vocabulary_size(tokenizer))


def load_reward_model(name_or_path, tokenizer, ds_config, tokens, allow_new_head=False,
                      normalise=False, lora_config=None):
    """
    -> RewardModel. See load_model.

    allow_new_head  the folder may hold a language model, which then gets a new head
    normalise       see RewardModel
    lora_config     a RunConfig: adapters where it has --lora_dim
    """
    model = load_model(name_or_path, tokenizer, ds_config, tokens, head="score",
                       allow_new_head=allow_new_head)
    if lora_config is not None:
        model = add_lora(model, lora_config)
    say_once(f"{name_or_path}: reward model, {parameter_count(model) / 1e6:.1f}M parameters")
    return RewardModel(model, normalise)


def load_model(name_or_path, tokenizer, ds_config, tokens, head="lm", allow_new_head=False):
    """
    A Hugging Face model in the compute dtype, all dropout off (see disable_dropout), its vocabulary
    as large as the tokenizer's, its pad and EOS ids the tokenizer's.

    name_or_path   folder, hub name, or `tiny`: random weights in the shape of configs/tiny.json
    tokens         the longest sequence that it will see
    head           "lm" (AutoModelForCausalLM) or "score" (AutoModelForSequenceClassification with
                   one label)
    allow_new_head  with "score": the folder may hold a language model, which then gets a new head
    raises         UsageError for a folder or name that holds no such model, or too few positions
    """
    hf_config = read_config(name_or_path)
    check_positions(name_or_path, hf_config, tokens)
    disable_dropout(hf_config)
    if head == "score":
        hf_config.num_labels = 1

    # While this object lives, transformers loads only this rank's share of the weights, so it is
    # kept to the end of this function.
    zero3 = None  # noqa: F841
    if ds_config["zero_optimization"]["stage"] == 3:
        zero3 = transformers.integrations.HfDeepSpeedConfig(ds_config)  # noqa: F841
    model, missing = read_weights(name_or_path, hf_config, ds_config, head, len(tokenizer))

    # A folder of another kind is known by the weights that it lacks.
    random_weights = name_or_path == "tiny"
    expected = ["score.weight"] if allow_new_head and not random_weights else []
    if missing and missing != expected:
        kind = "language model"
        if head == "score":
            kind = "reward model (a sequence classification model with one label)"
        raise UsageError(f"{name_or_path} is no {kind}: its weights lack {', '.join(missing[:3])}"
                         f"{' and more' * (len(missing) > 3)}.")
    if head == "score" and (missing or random_weights):
        initialise_head(model)
    known = model.get_input_embeddings().num_embeddings
    if vocabulary_size(tokenizer) > known:
        print0(f"{name_or_path}: its tokenizer has {vocabulary_size(tokenizer)} ids and the model "
               f"{known} embeddings, so random ones are added (with many, the tokenizer is another "
               "model's)")
        model.resize_token_embeddings(vocabulary_size(tokenizer))
    set_special_tokens(model, tokenizer, head)
    model.config.use_cache = False
    return model


def read_config(name_or_path):
    """
    The Hugging Face config of a folder, a hub name or `tiny`. Raises UsageError where there is
    none, and for a model that does not predict the next token.
    """
    check_local_path(name_or_path)
    source = CONFIGS / "tiny.json" if name_or_path == "tiny" else name_or_path
    if (Path(source) / "adapter_config.json").exists():
        raise UsageError(f"{name_or_path} holds LoRA adapters (adapter_config.json): merge them "
                         "into their base model (merge_and_unload of PEFT), save that, and name "
                         "its folder.")
    try:
        hf_config = AutoConfig.from_pretrained(source)
    except Exception as error:  # of any kind, because configs check themselves
        raise UsageError(
            f"{name_or_path}: not a model folder, and not found on the hub ({first_line(error)}). "
            "A model folder holds config.json, weights (model.safetensors) and a tokenizer."
        ) from error
    check_decoder(name_or_path, hf_config)
    return hf_config


def check_decoder(name_or_path, hf_config):
    """
    Raises UsageError for an encoder, alone or before a decoder. Hugging Face loads BERT and its kin
    as causal LMs too, which then see the tokens that they are to predict.
    """
    # The configs of encoders have is_decoder. Of decoders only GPT-NeoX's have it, always False.
    is_encoder = (getattr(hf_config, "is_decoder", True) is False
                  and not hf_config.model_type.startswith("gpt_neox"))
    if is_encoder or getattr(hf_config, "is_encoder_decoder", False):
        raise UsageError(f"{name_or_path}: a model of type {hf_config.model_type} has an encoder, "
                         "which reads a text's later words too; a decoder that predicts the next "
                         "token is needed, as in OPT or Llama.")


def check_positions(name_or_path, hf_config, tokens):
    """Raises UsageError for a model that has fewer positions than its longest sequence tokens."""
    positions = getattr(hf_config, "max_position_embeddings", None)
    if positions and tokens > positions:
        raise UsageError(
            f"{name_or_path} has {positions} positions and {tokens} tokens were asked for; lower "
            "--max_seq_len, or --max_prompt_seq_len and --max_answer_seq_len, which are added up.")


def read_weights(name_or_path, hf_config, ds_config, head, vocabulary):
    """
    -> (model, sorted names of the weights that the folder lacks). Below ZeRO 3 the weights go
    straight to the device, because the ranks of a host would need as many copies of them in its
    memory. Raises UsageError for weights that cannot be read, or have other shapes than the config
    says.
    """
    dtype = compute_dtype(ds_config)
    auto = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    if name_or_path == "tiny":
        hf_config.vocab_size = vocabulary
        return auto.from_config(hf_config, dtype=dtype), []
    place = None
    if ds_config["zero_optimization"]["stage"] < 3 and get_accelerator().device_name() != "cpu":
        place = device()
    try:
        model, info = auto.from_pretrained(name_or_path, config=hf_config, dtype=dtype,
                                           device_map=place, output_loading_info=True,
                                           ignore_mismatched_sizes=True)
    except Exception as error:  # of any kind, because models and their files raise many
        if is_out_of_memory(error):
            raise
        raise UsageError(f"{name_or_path}: its weights could not be loaded "
                         f"({first_line(error).rstrip('.')}).") from error
    for name, found, needed in sorted(info["mismatched_keys"]):
        raise UsageError(f"{name_or_path}: its weight {name} has the shape {tuple(found)}, and "
                         f"{tuple(needed)} is needed: config.json is another model's, or the "
                         "reward model has more than one label.")
    # Asked for directly, because with tied embeddings a reward model lacks nothing.
    if head == "lm" and "score.weight" in info["unexpected_keys"]:
        raise UsageError(f"{name_or_path} is no language model: it holds a reward model's "
                         "score.weight.")
    of_blocks = [key for key in sorted(info["unexpected_keys"])
                 if any(part.isdigit() for part in key.split("."))]  # numbers name the blocks
    if of_blocks:
        print0(f"warning: {name_or_path}: {len(of_blocks)} weights of its files have no place in "
               f"the model of its config.json and are left out ({of_blocks[0]} first)")
    return model, sorted(info["missing_keys"])


def disable_dropout(hf_config):
    """
    Sets every dropout probability of a Hugging Face config to 0, because PPO compares the
    log-probabilities of two passes, and noise in them makes the ratio differ from 1 before any
    update. In the config and not in nn.Dropout modules, because OPT and BLOOM call dropout as a
    function.
    """
    for name, value in hf_config.to_dict().items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if "drop" in name and is_number:
            setattr(hf_config, name, 0.0)


def initialise_head(model):
    """N(0, 1 / (hidden + 1)) (Stiennon et al. 2020, appendix): first scores near unit scale."""
    weight = model.score.weight
    with deepspeed.zero.GatheredParameters(weight, modifier_rank=0):
        nn.init.normal_(weight, std=1 / math.sqrt(weight.size(-1) + 1))


def set_special_tokens(model, tokenizer, head):
    """Pad and EOS of the tokenizer. A language model's own further EOS tokens end answers too."""
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    if head == "score":
        return
    generation = model.generation_config
    ends = generation.eos_token_id
    if ends is None:
        ends = []
    elif not isinstance(ends, list):
        ends = [ends]
    ends = sorted({tokenizer.eos_token_id, *ends})
    generation.eos_token_id = ends if len(ends) > 1 else tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id


# -----------------------------------------------------------------------------
# out

def save_model(engine, tokenizer, folder, averages=None):
    """
    A trained model as a Hugging Face folder: safetensors, config, generation config, tokenizer with
    its chat template. LoRA is merged into the weights. Where the rest was frozen the adapter is
    also saved by itself, in PEFT's format, in folder/adapter. All files are complete before the
    first takes its name, so a save that is interrupted before leaves the older model as it was.

    averages  name -> tensor that stands in for the weight it averages (EMA)
    Collective; rank 0 writes. Raises UsageError, on all ranks, where it cannot.
    """
    model = engine.module.model
    state = whole_state(engine)
    if averages:
        # A tied head has no average of its own. Saved beside the embedding's average it would come
        # loose from it, so it is left out.
        all_names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        tied = all_names - dict(model.named_parameters()).keys()
        state = {name: averages.get(name, tensor).to(tensor.dtype)
                 for name, tensor in state.items() if name not in tied}
    on_rank0(lambda: write_and_replace(model, tokenizer, state, Path(folder)))


def write_and_replace(model, tokenizer, state, folder):
    """Rank 0. Raises UsageError where the disk is full, say; the older model then stays."""
    staging = folder / ".saving"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        write_folder(model, tokenizer, state, staging)
        replace_files(staging, folder)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise UsageError(f"{folder}: the model could not be saved ({first_line(error)}). Make room,"
                         " then go on from the newest checkpoint by --resume, if there is "
                         "one; a model that was there before is as it was.") from error


def whole_state(engine):
    """State dict of the engine's Hugging Face model; under ZeRO 3 rank 0's, empty elsewhere."""
    if engine.zero_optimization_stage() < 3:
        return engine.module.model.state_dict()
    whole = engine._zero3_consolidated_16bit_state_dict() or {}
    state = {name.removeprefix("model."): tensor for name, tensor in whole.items()}
    # DeepSpeed's recursive function holds itself, and with it this dict of all weights, until
    # Python next looks for such circles.
    whole.clear()
    return state


def write_folder(model, tokenizer, state, folder):
    adapters, state = split_lora_state(model, state)
    model.config.use_cache = True
    model.save_pretrained(folder, state_dict=state)
    model.config.use_cache = False
    tokenizer.save_pretrained(folder)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    beside_adapters = trained - adapters.keys()
    if adapters and beside_adapters <= {"score.weight"}:
        head = {name: state[name] for name in beside_adapters}
        save_adapter(adapters, head, model, folder / "adapter")


def replace_files(staging, folder):
    """Moves the new files into the folder, and removes what an older model left beside them."""
    new_files = sorted(staging.iterdir())
    older_weights = set(folder.glob("model*.safetensors*")) - {folder / f.name for f in new_files}
    shutil.rmtree(folder / "adapter", ignore_errors=True)  # an earlier run's
    # config.json goes first and comes last, because without it the folder is not taken for a model,
    # and weights of one run with the config of another would be one.
    (folder / "config.json").unlink(missing_ok=True)
    new_files.sort(key=lambda file: file.name == "config.json")
    for file in new_files:
        os.replace(file, folder / file.name)
    for file in older_weights:
        file.unlink()
    staging.rmdir()
