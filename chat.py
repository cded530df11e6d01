"""
A conversation with a trained model, in the terminal; /help lists its commands:

    python chat.py --path output/actor
    # several models answer the same questions, each in a conversation of its own; behind an answer
    # stand its score and how far the model has moved from the first one in it
    python chat.py --path output/sft output/actor --reward_model output/reward
    # one answer, for scripts
    python chat.py --path output/actor --prompt "What is the opposite of hot?"
    # for browsers (a page) and programs (OpenAI's protocol); see support/serve.py
    python chat.py --path output/sft output/actor --reward_model output/reward --serve

A folder is a plain Hugging Face one: its chat template formats the conversation as it was trained
on, transformers generates (with --serve this project's own decoder). When a conversation outgrows
the model's positions, the oldest exchanges are forgotten, and that is said.

    score = (reward model's value at the answer's last token - mean) / deviation, as PPO sees it
    KL    = sum over the answer's tokens of log p_own - log p_first, in nats and at temperature 1:
            of this one answer, so it may be negative; its mean over sampled answers is the KL
"""

import sys
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, TextStreamer
from transformers.utils import logging

from data import encode_answers, encode_prompts, load_tokenizer
from support.flags import (CheckedConfig, UsageError, exit_on_usage_error, first_line, flag,
                           is_out_of_memory, parse_config)
from support.models import (LanguageModel, check_decoder, last_token, load_reward_model,
                            vocabulary_size)

COMMANDS = {"/help": "lists the commands", "/reset": "starts over", "/quit": "leaves"}


@dataclass
class Config(CheckedConfig):
    path: list[str] = flag(["output/actor"], "model folders or hub names; several: side by side")
    reward_model: str = flag("", "folder of a reward model: shows its score of each answer")
    system: str = flag("", "text of a system turn before the conversation")
    prompt: str = flag("", "answer this once and exit")
    max_new_tokens: int = flag(256, "tokens an answer may have", at_least=1)
    temperature: float = flag(0.0, "0 always takes the likeliest token", at_least=0)
    top_p: float = flag(1.0, "nucleus sampling, with a temperature over 0", over=0, at_most=1)
    seed: int = flag(1234, "of the sampling", at_least=0, at_most=2**32 - 1)

    serve: bool = flag(False, "answer over HTTP instead of here")
    host: str = flag("127.0.0.1", "of --serve: the address to listen on; 0.0.0.0: all, unguarded")
    port: int = flag(8000, "of --serve; 0: any that is free", at_least=0, at_most=65535)
    max_concurrency: int = flag(8, "of --serve: answers of a model at once; more are refused",
                                at_least=1)
    max_seq_len: int = flag(2048, "of --serve: tokens of a conversation with its answer, at most",
                            at_least=2)

    def check(self):
        for path in self.path:
            if self.path.count(path) > 1:
                raise UsageError(f"--path names {path} twice, and answers stand under their "
                                 "model's name; name each model once.")
        for name in ("prompt", "system"):
            if self.serve and getattr(self, name):
                raise UsageError(f"--{name} with --serve: a request brings its own messages, of a "
                                 f"system turn too; leave --{name} out.")


# -----------------------------------------------------------------------------
# a model that speaks

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


def check_system_turn(name, tokenizer, system):
    """Raises UsageError where the chat template refuses a system turn, or leaves it out."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Hi"}]
    try:
        (text,), _ = encode_prompts(tokenizer, [messages])
        written = system.strip() in text
    except UsageError:
        written = False
    if not written:
        raise UsageError(f"--system: the chat template of {name} has no system turn, so the model "
                         "would not see it; leave --system out, and say it in the first message.")


def encode(tokenizer, messages, room):
    """
    Leaves out the oldest exchanges, but no system turn, until the rest has at most `room` tokens.

    returns  ids (1, P), which end where the assistant's turn begins; how many exchanges were left
             out
    raises   UsageError where the last message alone is too long
    """
    first = 1 if messages[0]["role"] == "system" else 0
    for dropped in range(0, len(messages) - first, 2):
        rest = messages[:first] + messages[first + dropped:]
        _, (ids,) = encode_prompts(tokenizer, [rest])
        if len(ids) <= room:
            return torch.tensor([ids]), dropped // 2
    raise UsageError(f"the message has {len(ids)} tokens; this model has room for {room} beside "
                     "an answer of --max_new_tokens. Shorten one of them.")


class Speaker:
    """
    One of the models, with its own side of the conversation.

    positions       that the model has, for conversation and answer together
    max_new_tokens  that an answer may have: at most half of them
    """

    def __init__(self, path, config):
        self.name = path
        self.config = config
        self.tokenizer, self.model = load(path)
        self.positions = getattr(self.model.config, "max_position_embeddings", None) or 2**31
        self.max_new_tokens = min(config.max_new_tokens, self.positions // 2)
        if config.system:
            check_system_turn(path, self.tokenizer, config.system)
        self.reset()

        # The model's other defaults (a repetition penalty, say) go, because generate would add them
        # to what the flags say.
        ends = self.model.generation_config.eos_token_id  # a list where several end an answer
        self.ends = ends or self.tokenizer.eos_token_id
        self.model.generation_config = GenerationConfig()

    def reset(self):
        """Forgets the conversation."""
        self.messages = []
        if self.config.system:
            self.messages = [{"role": "system", "content": self.config.system}]

    def answer(self, messages):
        """
        Streams the answer to standard output as it is made.

        returns  prompt ids (1, P), answer ids (1, R), and the answer as text
        """
        ids, dropped = encode(self.tokenizer, messages, self.positions - self.max_new_tokens)
        if dropped:
            print(f"(the model's {self.positions} positions are full: the oldest {dropped} "
                  "exchange(s) are forgotten)", file=sys.stderr)
        ids = ids.to(self.model.device)

        # Generation is greedy, or drawn from the model's own distribution with nothing of the
        # folder's defaults.
        sampling = {"do_sample": False}
        if self.config.temperature != 0:
            sampling = {"do_sample": True, "temperature": self.config.temperature,
                        "top_p": self.config.top_p, "top_k": 0}
        generation = GenerationConfig(
            max_new_tokens=self.max_new_tokens, eos_token_id=self.ends,
            pad_token_id=self.tokenizer.pad_token_id, **sampling)
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids),
                                      generation_config=generation, streamer=streamer)
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise UsageError("the model's probabilities are no numbers (NaN): its weights have "
                             f"overflowed, or --temperature {self.config.temperature} is too small."
                             ) from error
        answer = out[:, ids.size(1):]
        return ids, answer, self.tokenizer.decode(answer[0], skip_special_tokens=True).strip()


# -----------------------------------------------------------------------------
# what is said of an answer

class Judge:
    """The reward model's score of an answer, where there is one, and the KL to the first model."""

    def __init__(self, config, speakers):
        self.vocabularies = {speaker.name: vocabulary_size(speaker.tokenizer)
                             for speaker in speakers}
        self.reward_model = None
        self.scored_by_ids = set()  # names of models with the reward model's tokenizer
        if config.reward_model:
            self.reward_tokenizer = load_tokenizer(config.reward_model)
            in_float32 = {"zero_optimization": {"stage": 0}}
            model = load_reward_model(config.reward_model, self.reward_tokenizer, in_float32,
                                      tokens=1, normalise=True)
            self.reward_model = model.to(speakers[0].model.device).eval()
            words = self.reward_tokenizer.get_vocab()
            self.scored_by_ids = {speaker.name for speaker in speakers
                                  if speaker.tokenizer.get_vocab() == words}
        self.first = speakers[0]
        self.comparable = set()  # names of models that give probabilities to the first one's tokens
        for speaker in speakers[1:]:
            if speaker.tokenizer.get_vocab() == self.first.tokenizer.get_vocab():
                self.comparable.add(speaker.name)
            else:
                print(f"({speaker.name} has another tokenizer than {self.first.name}, so there is "
                      "no KL between them)")

    @torch.no_grad()
    def measures(self, speaker, messages, prompt, answer, text):
        """
        messages, prompt (1, P), answer (1, R), text  as Speaker.answer takes and returns them
        returns  {"score": deviations, "kl": nats}, each where there is one: no score where the
                 reward model's template refuses the dialogue, or it has too few positions
        """
        found = {}
        if self.reward_model is not None:
            score = self.score(speaker, messages, prompt, answer, text)
            if score is not None:
                found["score"] = score
        ids = torch.cat([prompt, answer], 1)
        # The first model may have fewer positions than the one that answered.
        if speaker.name in self.comparable and ids.size(1) <= self.first.positions:
            own, first = (
                LanguageModel(model, self.vocabularies[speaker.name])(
                    ids, torch.ones_like(ids), torch.ones_like(answer))[0].sum()
                for model in (speaker.model, self.first.model))
            found["kl"] = float(own - first)
        return found

    def score(self, speaker, messages, prompt, answer, text):
        """The reward model's score, or None where it cannot read the answer."""
        ids = torch.cat([prompt, answer], 1)
        if speaker.name not in self.scored_by_ids:
            # In the reward model's own words; its EOS only where the answer came to its end.
            try:
                encoded = encode_answers(self.reward_tokenizer, [messages], [text])
            except UsageError:  # its template has no system turn, say
                return None
            (prompt_ids, answer_ids), = encoded
            ends = torch.as_tensor(speaker.ends, device=answer.device).view(-1)
            if not torch.isin(answer[0, -1:], ends).item():
                answer_ids = answer_ids[:-1]
            ids = torch.tensor([prompt_ids + answer_ids], device=answer.device)
        positions = getattr(self.reward_model.config, "max_position_embeddings", None) or 2**31
        if ids.size(1) > positions:
            return None
        mask = torch.ones_like(ids)
        return float(last_token(self.reward_model(ids, mask), mask))

    def say(self, measures):
        """Prints measures in a line of their own, where there are any."""
        parts = []
        if "score" in measures:
            parts.append(f"score {measures['score']:.2f}")
        if "kl" in measures:
            parts.append(f"KL to {self.first.name} {measures['kl']:.2f} nats")
        if parts:
            print(f"  ({', '.join(parts)})")


# -----------------------------------------------------------------------------
# the conversation

def line_reader():
    """
    -> function of a prompt, which returns what the user says next. It raises EOFError at the end of
    input, and KeyboardInterrupt for Ctrl-C on an empty line.
    """
    if sys.stdin is None:
        raise UsageError("standard input is closed, so nobody can be heard; give --prompt.")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        sys.stdin.reconfigure(errors="replace")  # because one odd byte must not end a conversation
        return input
    try:
        # Only here, because scripts and pipes do without it.
        from prompt_toolkit import PromptSession
    except ImportError:
        print("(arrows and pasted lines need prompt_toolkit: pip install -r requirements.txt)")
        sys.stdin.reconfigure(errors="replace")
        return input

    session = PromptSession()  # remembers what was said, for the arrow up

    def read(prompt):
        while True:
            try:
                return session.prompt(prompt)
            except KeyboardInterrupt:  # clears a line that was begun
                if not session.default_buffer.text:
                    raise

    return read


def converse(speakers, judge):
    """Reads questions and has every model answer them, until the user leaves."""
    read = line_reader()
    for speaker in speakers:
        advice = " /reset starts over, /quit leaves." if speaker is speakers[-1] else ""
        print(f"{speaker.name}: {speaker.model.num_parameters() / 1e6:.1f}M parameters on "
              f"{speaker.model.device}.{advice}")
    while True:
        try:
            line = read("\nHuman: ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command = line.strip()
        if command == "/quit":
            return
        if command == "/reset":
            for speaker in speakers:
                speaker.reset()
            print("(a new conversation)")
        elif command == "/help":
            print_commands()
        elif line.startswith("/"):
            print(f"({command.split()[0]} is no command; a message that begins with / needs a "
                  "blank before it, and is then sent)")
            print_commands()
        elif command:
            answer_all(speakers, judge, {"role": "user", "content": command})


def print_commands():
    for command, meaning in COMMANDS.items():
        print(f"  {command:8}{meaning}")
    print("  Ctrl-C stops an answer, which is then forgotten, and leaves where nothing is typed")


def answer_all(speakers, judge, question):
    """
    Every model answers, one after another. An answer that is impossible leaves no trace in its
    model's conversation; where the user stops one, the question leaves none in any.
    """
    answered = []
    try:
        for speaker in speakers:
            name = speaker.name if len(speakers) > 1 else "Assistant"
            print(f"\n{name}: ", end="", flush=True)
            messages = speaker.messages + [question]
            try:
                prompt, answer, text = speaker.answer(messages)
                judge.say(judge.measures(speaker, messages, prompt, answer, text))
            except UsageError as error:
                print(error)
                continue
            answered.append((speaker, text))
    except KeyboardInterrupt:
        print()
        return
    for speaker, text in answered:
        speaker.messages += [question, {"role": "assistant", "content": text}]


def main(config):
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    speakers = [Speaker(path, config) for path in config.path]
    judge = Judge(config, speakers)
    torch.manual_seed(config.seed)
    if config.serve:
        try:
            # Only here, because the terminal does without a web server.
            from support.serve import serve
        except ImportError as error:
            raise UsageError(f"--serve needs starlette and uvicorn ({first_line(error)}): pip "
                             "install -r requirements.txt") from error
        serve(speakers, judge, config)
        return
    if not config.prompt:
        converse(speakers, judge)
        return

    # With --prompt each model answers once, and an answer that is impossible is an error.
    question = {"role": "user", "content": config.prompt}
    for speaker in speakers:
        if len(speakers) > 1:
            print(f"\n{speaker.name}: ", end="", flush=True)
        messages = speaker.messages + [question]
        prompt, answer, text = speaker.answer(messages)
        judge.say(judge.measures(speaker, messages, prompt, answer, text))


if __name__ == "__main__":
    with exit_on_usage_error():
        main(parse_config(Config, __doc__))
