"""
A conversation with a trained model, in the terminal; /reset starts over, /quit or the end of input
leaves:

    python chat.py --path output/actor
    # one answer, for scripts
    python chat.py --path output/actor --prompt "What is the opposite of hot?"

The folder is a plain Hugging Face one: its chat template formats the conversation as it was trained
on, transformers generates. When a conversation outgrows the model's positions, the oldest exchanges
are forgotten, and that is said.
"""

import sys
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, TextStreamer
from transformers.utils import logging

from data import load_tokenizer
from support.flags import (CheckedConfig, UsageError, exit_on_usage_error, first_line, flag,
                           is_out_of_memory, parse_config)
from support.models import check_decoder, vocabulary_size


@dataclass
class Config(CheckedConfig):
    path: str = flag("output/actor", "model folder or hub name")
    prompt: str = flag("", "answer this once and exit")
    max_new_tokens: int = flag(256, "tokens an answer may have", at_least=1)
    temperature: float = flag(0.0, "0 always takes the likeliest token", at_least=0)
    top_p: float = flag(1.0, "nucleus sampling, with a temperature over 0", over=0, at_most=1)
    seed: int = flag(1234, "of the sampling", at_least=0, at_most=2**32 - 1)


def load(path):
    """Folder or hub name -> (tokenizer, model in eval mode on the GPU if there is one)."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(path, dtype="auto",
                                                           output_loading_info=True)
    except Exception as error:  # of any kind, because models and their files raise many
        if is_out_of_memory(error):
            raise
        raise UsageError(f"--path {path}: no language model could be loaded ({first_line(error)}). "
                         "Train one with run_all.sh, or give a folder or hub name.") from error
    check_decoder(f"--path {path}", model.config)
    if info["missing_keys"] or "score.weight" in info["unexpected_keys"]:
        raise UsageError(f"--path {path}: no language model but a reward model or critic; the "
                         "actor is the one that talks.")
    tokenizer = load_tokenizer(path)
    known = model.get_input_embeddings().num_embeddings
    if vocabulary_size(tokenizer) > known:
        raise UsageError(f"--path {path}: its tokenizer has {vocabulary_size(tokenizer)} ids and "
                         f"the model {known} embeddings, so it is another model's tokenizer.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return tokenizer, model.to(device).eval()


def encode(tokenizer, messages, room):
    """
    Leaves out the oldest exchanges until the rest has at most `room` tokens.

    returns  ids (1, P), which end where the assistant's turn begins; how many exchanges were left
             out
    raises   UsageError where the last message alone is too long
    """
    for dropped in range(0, len(messages), 2):
        text = tokenizer.apply_chat_template(messages[dropped:], tokenize=False,
                                             add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        if ids.size(1) <= room:
            return ids, dropped // 2
    raise UsageError(f"the message has {ids.size(1)} tokens; this model has room for {room} beside "
                     "an answer of --max_new_tokens. Shorten one of them.")


def main(config):
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer, model = load(config.path)

    # The answer may take half of the model's positions, and the conversation has the rest.
    positions = getattr(model.config, "max_position_embeddings", None) or 2**31
    max_new_tokens = min(config.max_new_tokens, positions // 2)

    # Generation is greedy, or drawn from the model's own distribution with nothing of the folder's
    # defaults.
    sampling = {"do_sample": False}
    if config.temperature != 0:
        sampling = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p,
                    "top_k": 0}
    ends = model.generation_config.eos_token_id  # a list where several tokens end an answer
    # The model's other defaults (a repetition penalty, say) go, because generate would add them to
    # what the flags say.
    model.generation_config = GenerationConfig()
    generation = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=ends or tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **sampling)

    def answer(messages):
        """Streams the answer to standard output as it is made, and returns it."""
        ids, dropped = encode(tokenizer, messages, positions - max_new_tokens)
        if dropped:
            print(f"(the model's {positions} positions are full: the oldest {dropped} exchange(s) "
                  "are forgotten)", file=sys.stderr)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids = ids.to(model.device)
        try:
            out = model.generate(ids, attention_mask=torch.ones_like(ids),
                                 generation_config=generation, streamer=streamer)
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise UsageError("the model's probabilities are no numbers (NaN): its weights have "
                             f"overflowed, or --temperature {config.temperature} is too small."
                             ) from error
        return tokenizer.decode(out[0, ids.size(1):], skip_special_tokens=True).strip()

    # With --prompt there is one answer and no conversation.
    torch.manual_seed(config.seed)
    if config.prompt:
        answer([{"role": "user", "content": config.prompt}])
        return

    # The conversation: `messages` grows by a question and its answer.
    if sys.stdin is None:
        raise UsageError("standard input is closed, so nobody can be heard; give --prompt.")
    sys.stdin.reconfigure(errors="replace")  # because one odd byte must not end a conversation
    print(f"{config.path}: {model.num_parameters() / 1e6:.1f}M parameters on {model.device}. "
          "/reset starts over, /quit leaves.")
    messages = []
    while True:
        try:
            line = input("\nHuman: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/quit":
            return
        if line == "/reset":
            messages = []
            print("(a new conversation)")
        elif line:
            # An answer that is stopped or impossible leaves no trace in the conversation.
            print("\nAssistant: ", end="", flush=True)
            question = {"role": "user", "content": line}
            try:
                reply = answer(messages + [question])
            except KeyboardInterrupt:  # stops this answer, not the conversation
                print()
                continue
            except UsageError as error:
                print(error)
                continue
            messages += [question, {"role": "assistant", "content": reply}]


if __name__ == "__main__":
    with exit_on_usage_error():
        main(parse_config(Config, __doc__))
