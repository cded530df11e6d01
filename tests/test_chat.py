"""chat.py in a real terminal: line editing, Ctrl-C, commands; several models; what is said of an answer."""

import subprocess
import sys

import pytest
import torch
import transformers

import chat
from conftest import ROOT, clean_environment
from models import hf_logprobs
from support.flags import UsageError
from terminal import Terminal

# chat.py, whose models say what they were asked, and then answer: with "yes", or what they say themselves.
ECHO = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
import chat
own_answer = chat.Speaker.answer
def answer(self, messages):
    print("<" + json.dumps([message["content"] for message in messages]) + ">", flush=True)
    if messages[-1]["content"] == "speak":
        return own_answer(self, messages)
    return torch.tensor([[1]]), torch.tensor([[1]]), "yes"
chat.Speaker.answer = answer
with chat.exit_on_usage_error():
    chat.main(chat.parse_config(chat.Config, "", sys.argv[2:]))
"""
PASTE = "\x1b[200~{}\x1b[201~"  # bracketed, as terminals send it
LEFT, UP = "\x1b[D", "\x1b[A"


@pytest.fixture
def start(tmp_path):
    """start("--path", folder) -> a Terminal with ECHO in it, ready for a message."""
    terminals = []

    def run(*flags, **options):
        (tmp_path / "echo.py").write_text(ECHO)
        env = {**clean_environment(), "TERM": "xterm-256color", "LANG": "C.UTF-8", "PYTHONUTF8": "1"}
        command = [sys.executable, str(tmp_path / "echo.py"), str(ROOT), *map(str, flags)]
        terminals.append(Terminal(command, env, **options))
        terminals[-1].expect("Human:")
        return terminals[-1]

    yield run
    for terminal in terminals:
        terminal.kill()


@pytest.mark.slow
def test_lines_are_edited_and_pasted(start, model_folders):
    pytest.importorskip("prompt_toolkit")
    terminal = start("--path", model_folders["lm"])

    def say(keys, heard):
        terminal.type(keys + "\r")
        terminal.expect(f"<{heard}>")
        terminal.expect("Human:")

    say("coold" + LEFT + LEFT + "\x7f", '["cold"]')                  # arrows and backspace
    say(UP + "!", '["cold", "yes", "cold!"]')                        # history
    terminal.type("/reset\r")
    terminal.expect("(a new conversation)")
    terminal.expect("Human:")
    say(PASTE.format("one\r\n  two\rthree"), r'["one\n  two\nthree"]')  # one message, sent by Enter alone
    terminal.type("/reset\r")
    terminal.expect("Human:")
    terminal.expect("Human:")
    say("Grüße, 世界 👋" + LEFT + "\x7f", r'["Gr\u00fc\u00dfe, \u4e16\u754c\ud83d\udc4b"]')
    terminal.type("/reset\r")
    terminal.expect("Human:")
    terminal.expect("Human:")

    # A narrower window in the middle of a line that then takes several rows.
    terminal.type("one two three four five ")
    terminal.resize(20)
    say("six seven eight nine", '["one two three four five six seven eight nine"]')
    terminal.resize(100)

    # Ctrl-C clears what is typed, and leaves where nothing is.
    terminal.type("not this")
    terminal.expect("this")
    terminal.type("\x03")
    terminal.expect("Human:")
    say("but this", '["one two three four five six seven eight nine", "yes", "but this"]')
    terminal.type("\x03")
    assert terminal.exit_code() == 0


def test_ctrl_c_stops_the_answer_and_not_the_conversation(start, endless):
    terminal = start("--path", endless, "--max_new_tokens", 8000)
    terminal.type("hello\r")
    terminal.expect('<["hello"]>')
    terminal.expect("Human:")
    terminal.type("speak\r")
    terminal.expect('<["hello", "yes", "speak"]>')
    terminal.read(3)  # words of the answer
    terminal.type("\x03")
    terminal.expect("Human:")
    terminal.type("again\r")
    terminal.expect('<["hello", "yes", "again"]>')  # the question is forgotten with its answer
    terminal.expect("Human:")
    terminal.type("\x04")  # Ctrl-D
    assert terminal.exit_code() == 0
    assert "Traceback" not in terminal.screen and "stopped by" not in terminal.screen


@pytest.fixture(scope="module")
def second(make_model, tokenizer, tmp_path_factory):
    """Another model with the same tokenizer."""
    folder = str(tmp_path_factory.mktemp("second"))
    make_model("opt", seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_models_side_by_side_and_the_commands(model_folders, second):
    first = model_folders["lm"]
    lines = "Hello!\n/what is this\n /slash\n/help\n/reset\nHello!\n/quit\nunread\n"
    done = subprocess.run(
        [sys.executable, str(ROOT / "chat.py"), "--path", first, second, "--reward_model", model_folders["reward"],
         "--max_new_tokens", "4", "--system", "Be kind."],
        input=lines, env=clean_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    parts = done.stdout.split("\nHuman: ")[1:]
    assert len(parts) == 7

    # Each answers under its name, with its score; the second is compared with the first.
    before, own, other = parts[0].partition(f"\n{second}: ")
    assert before.startswith(f"\n{first}: ") and own
    assert before.count("(score ") == 1 and "KL" not in before
    assert other.count("(score ") == 1 and f"KL to {first} " in other and " nats)" in other

    assert "/what is no command" in parts[1] and "/reset" in parts[1] and f"\n{first}: " not in parts[1]
    assert f"\n{first}: " in parts[2]  # a blank before it makes it a message
    assert all(command in parts[3] for command in chat.COMMANDS)
    assert "(a new conversation)" in parts[4]
    assert parts[5] == parts[0], "after /reset nothing is remembered, and the system turn is there again"


def test_what_is_said_of_an_answer(model_folders, second, tokenizer, capsys):
    """KL and score, against the Hugging Face models' own numbers."""
    config = chat.Config(path=[model_folders["lm"], second], reward_model=model_folders["reward"], max_new_tokens=6)
    speakers = [chat.Speaker(path, config) for path in config.path]
    judge = chat.Judge(config, speakers)
    messages = [{"role": "user", "content": "Hello!"}]
    prompt, answer, text = speakers[1].answer(messages)
    found = judge.measures(speakers[1], messages, prompt, answer, text)

    ids = torch.cat([prompt, answer], 1)
    own, first = (hf_logprobs(speaker.model, ids, torch.ones_like(prompt), prompt.size(1)).sum()
                  for speaker in reversed(speakers))
    assert found["kl"] == pytest.approx(float(own - first), abs=1e-4) and abs(found["kl"]) > 0.1
    reward = transformers.AutoModelForSequenceClassification.from_pretrained(model_folders["reward"]).eval()
    with torch.no_grad():
        assert found["score"] == pytest.approx(reward(ids).logits.item(), abs=1e-4)
        assert "kl" not in judge.measures(speakers[0], messages, prompt, answer, text)

        # With another tokenizer the reward model reads the text in its own tokens, without the EOS of an
        # answer that was cut.
        judge.scored_by_ids.clear()
        read = tokenizer(text, add_special_tokens=False).input_ids
        expected = reward(torch.cat([prompt, torch.tensor([read])], 1)).logits.item()
    cut = torch.tensor([[5]])
    assert judge.measures(speakers[0], messages, prompt, cut, text)["score"] == pytest.approx(expected, abs=0.05)


def test_no_kl_between_tokenizers(model_folders, second, tmp_path, capsys):
    transformers.AutoModelForCausalLM.from_pretrained(second).save_pretrained(tmp_path)
    other = transformers.AutoTokenizer.from_pretrained(second)
    other.add_tokens(["<another>"])
    other.save_pretrained(tmp_path)
    config = chat.Config(path=[model_folders["lm"], str(tmp_path)])
    speakers = [speaker_without_model(path) for path in config.path]
    judge = chat.Judge(config, speakers)
    assert capsys.readouterr().out.count("another tokenizer") == 1
    assert not judge.comparable


def speaker_without_model(path):
    """A speaker without its model, whose embeddings are too few for the added token."""
    speaker = object.__new__(chat.Speaker)
    speaker.name, speaker.tokenizer = path, chat.load_tokenizer(path)
    return speaker


@pytest.mark.parametrize("template", [
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}!",
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[-1].content }}"])
def test_a_system_turn_that_the_template_does_not_have(template, model_folders):
    tokenizer = chat.load_tokenizer(model_folders["lm"], template)
    with pytest.raises(UsageError, match="--system: the chat template of NAME has no system turn"):
        chat.check_system_turn("NAME", tokenizer, "Be kind.")
    chat.check_system_turn("NAME", chat.load_tokenizer(model_folders["lm"]), "Be kind.")


def test_the_system_turn_outlives_the_oldest_exchanges(tokenizer):
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(9) for role in ("user", "assistant")][:-1]
    system = {"role": "system", "content": "Be kind."}
    ids, dropped = chat.encode(tokenizer, [system, *turns], room=60)
    text = tokenizer.decode(ids[0])
    assert 0 < dropped < 8 and text.startswith("Be kind.") and "user 8" in text and "user 0" not in text
    with pytest.raises(UsageError, match="room for 3"):
        chat.encode(tokenizer, [system, *turns], room=3)


@pytest.mark.parametrize("flags, said", [
    (dict(path=["a", "b", "a"]), "names a twice"), (dict(serve=True, prompt="Hi"), "--prompt with --serve"),
    (dict(serve=True, system="Hi"), "--system with --serve"), (dict(port=70000), "--port 70000")])
def test_flags_that_do_not_go_together(flags, said):
    with pytest.raises(UsageError, match=said):
        chat.Config(**flags)
