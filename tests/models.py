"""Small random models of every family: odd sizes, and no weight at its neutral value, so that a mistake shows."""

import torch
from transformers import AutoModelForCausalLM, CONFIG_MAPPING

HALF_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "partial_rotary_factor": 0.5,
             "original_max_position_embeddings": 16}
LLAMA = dict(vocab_size=101, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=52,
             num_key_value_heads=2, max_position_embeddings=128)
OPT = dict(vocab_size=101, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, ffn_dim=52,
           word_embed_proj_dim=48, max_position_embeddings=64)
GPT = dict(vocab_size=101, n_embd=48, n_layer=3, n_head=4, n_inner=52, n_positions=128)
NEOX = dict(vocab_size=101, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=52,
            max_position_embeddings=128)

# name -> (model type, config)
SMALL = {
    "opt": ("opt", OPT),
    "opt-350m": ("opt", {**OPT, "word_embed_proj_dim": 20, "do_layer_norm_before": False}),
    "opt-no-final-norm": ("opt", {**OPT, "_remove_final_layer_norm": True}),
    "opt-no-bias": ("opt", {**OPT, "enable_bias": False, "layer_norm_elementwise_affine": False}),
    "bloom": ("bloom", dict(vocab_size=101, hidden_size=60, n_layer=3, n_head=5)),
    "gpt2": ("gpt2", GPT),
    "gpt2-scales": ("gpt2", {**GPT, "scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False}),
    "gpt_neo": ("gpt_neo", dict(vocab_size=101, hidden_size=48, num_layers=4, num_heads=4, intermediate_size=52,
                                attention_types=[[["global", "local"], 2]], window_size=5, max_position_embeddings=64)),
    "gptj": ("gptj", {**GPT, "rotary_dim": 6, "tie_word_embeddings": False}),
    "codegen": ("codegen", {**GPT, "n_head": 8, "rotary_dim": 4, "n_embd": 96, "tie_word_embeddings": False}),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox-sequential": ("gpt_neox", {**NEOX, "use_parallel_residual": False, "rope_parameters": HALF_ROPE,
                                         "hidden_act": "gelu_new"}),
    "gpt_neox-yarn": ("gpt_neox", {**NEOX, "rope_parameters": YARN_ROPE}),
    "llama": ("llama", LLAMA),
    "llama-bias-tied": ("llama", {**LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
                                  "num_key_value_heads": 1, "head_dim": 10}),
    "llama-3": ("llama", {**LLAMA, "rope_parameters": LLAMA3_ROPE}),
    "mistral": ("mistral", {**LLAMA, "sliding_window": 6}),
    "qwen2": ("qwen2", {**LLAMA, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 14}),
    "gemma": ("gemma", {**LLAMA, "head_dim": 14}),
}


def small_model(name, dtype=torch.float32, seed=0, std=0.3, **changes):
    model_type, settings = SMALL[name]
    config = CONFIG_MAPPING[model_type](**{**settings, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
                                           **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        else:
            torch.nn.init.normal_(parameter, mean=0.0 if model_type == "gemma" else 1.0, std=0.3)
    return model.to(dtype)


def ragged_prompts(rows=5, length=9, vocabulary=101, seed=1):
    """Left-padded (B, P) ids and mask: one full prompt, one of a single token, the rest between; junk as padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (rows, length), generator=generator)
    lengths = torch.tensor([length, 1, *torch.randint(1, length + 1, (rows,), generator=generator).tolist()])[:rows]
    return ids, (torch.arange(length) >= length - lengths[:, None]).long()


def hf_logprobs(model, tokens, attention_mask, prompt, temperature=1.0):
    """The training forward: (B, R) log-probabilities of the response tokens, positions from the first real token."""
    mask = torch.cat([attention_mask, torch.ones_like(tokens[:, prompt:])], 1)
    tokens = tokens.masked_fill(mask == 0, 0)
    positions = {} if model.config.model_type == "bloom" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask, **positions).logits[:, prompt - 1:-1].float() / temperature
    return logits.log_softmax(-1).gather(-1, tokens[:, prompt:, None]).squeeze(-1)
