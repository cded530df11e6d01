"""
chat.py --serve: a real server, real clients and a real browser; and the batch under it, which rows join and leave
between two tokens.
"""

import asyncio
import http.client
import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import chat
from conftest import ROOT, clean_environment
from hybrid_engine import InferenceEngine, RollingBatch
from kernels.decoder import Decoder
from models import small_model

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
from support.serve import Answer, text_pieces  # noqa: E402

QUESTIONS = ["Hello!", "What is the opposite of hot?", "One", "What does a cow say, and why?", "2 + 3?",
             "How do you spell cat?", "Who are you? Tell me more of it, please.", "Bye!"]


# -----------------------------------------------------------------------------
# the batch

@pytest.mark.parametrize("name", ["opt", "llama", "bloom", "gpt_neo", "mistral", "gemma"])
def test_rows_that_come_and_go_say_what_they_say_alone(name, monkeypatch):
    model = small_model(name)
    engine = InferenceEngine(model)
    draw = random.Random(1)
    prompts = [[draw.randrange(101) for _ in range(draw.randrange(1, 20))] for _ in range(25)]
    lengths = [draw.randrange(1, 20) for _ in prompts]

    monkeypatch.setattr(RollingBatch, "SPARE", 4)  # so that all rows move often
    moves = []
    move = Decoder.move

    def moved(self, by):
        moves.append(by)
        move(self, by)

    monkeypatch.setattr(Decoder, "move", moved)
    batch = RollingBatch(engine, 4, 40)
    batch.cache.data.fill_(float("nan"))  # memory that nobody has written
    waiting, live, said = list(range(25)), [], {row: [] for row in range(25)}
    while waiting or live:
        while waiting and len(live) < 4 and draw.random() < 0.4:
            batch.join(prompts[waiting[0]])
            live.append(waiting.pop(0))
        if not live:
            continue
        tokens = batch.logits.argmax(-1)
        for row, token in zip(live, tokens.tolist()):
            said[row].append(token)
        stay = [place for place, row in enumerate(live) if len(said[row]) < lengths[row]]
        batch.keep(stay)
        live = [live[place] for place in stay]
        if live:
            batch.step(tokens[stay])
            assert batch.column <= batch.cache.data.size(-2)

    assert min(moves) < 0 < max(moves)
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        alone = engine.generate(ids, torch.ones_like(ids), lengths[row], temperature=0, eos_token_id=None)
        assert said[row] == alone.tokens[0, len(prompt):].tolist(), row


# -----------------------------------------------------------------------------
# text

@pytest.mark.parametrize("text, stops, pieces", [
    ("a cow says", [], ["a", " cow", " says"]),
    ("cow 世界 cow", [], ["cow", " 世", "界", " cow"]),                # three tokens a letter, none of them alone
    ("says a cow says moo", ["cow moo", "cow says"], ["says", " a"]),  # held back while it may become a stop
    ("a cow moo", ["cow says"], ["a", " cow moo"]),
    (" cow  ", [], ["cow"])])
def test_text_is_final_when_it_is_sent(text, stops, pieces, tokenizer):
    async def send():
        answer = Answer([], 99, 0.0, 1.0, random.Random(), asyncio.get_running_loop())
        *tokens, last = tokenizer(text, add_special_tokens=False).input_ids
        for token in tokens:
            answer.events.put_nowait((token, None))
        answer.events.put_nowait((last, "length"))
        return [piece async for piece, _, _ in text_pieces(answer, tokenizer, stops) if piece]

    assert asyncio.run(send()) == pieces


# -----------------------------------------------------------------------------
# a server in a process of its own

class Server:
    def __init__(self, log, *flags):
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "chat.py"), "--serve", "--port", "0", *map(str, flags)],
            env={**clean_environment(), "PYTHONUNBUFFERED": "1"}, stdout=open(log, "w"), stderr=subprocess.STDOUT)
        deadline = time.time() + 180
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())):
            assert self.process.poll() is None and time.time() < deadline, log.read_text()
            time.sleep(0.1)
        self.port = int(found[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return json.load(response)

    def post(self, body, path="/v1/chat/completions"):
        """-> status, JSON. body: bytes, or what becomes JSON."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def ask(self, model, question="Hello!", **settings):
        """A whole answer's choice."""
        messages = [{"role": "user", "content": question}]
        status, answer = self.post({"model": model, "messages": messages, **settings})
        assert status == 200, answer
        return answer["choices"][0]

    def begin(self, model, question="Hello!", **settings):
        """A connection on which a stream has begun."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", "/v1/chat/completions", json.dumps({
            "model": model, "messages": [{"role": "user", "content": question}], "stream": True, **settings}))
        response = connection.getresponse()
        assert response.status == 200
        assert response.readline().startswith(b"data: ")
        return connection

    def wait_for(self, model, answering, seconds=20):
        deadline = time.time() + seconds
        while self.get("/health")["models"][model]["answering"] != answering:
            assert time.time() < deadline, self.get("/health")
            time.sleep(0.05)

    def stop(self):
        """Ctrl-C -> exit code, and all that it wrote."""
        self.process.send_signal(signal.SIGINT)
        try:
            code = self.process.wait(timeout=30)
        finally:
            self.process.kill()
        return code, self.log.read_text()


@pytest.fixture(scope="module")
def server(endless, model_folders, tmp_path_factory):
    """Two models and a reward model."""
    server = Server(tmp_path_factory.mktemp("server") / "log", "--path", endless, model_folders["lm"],
                    "--reward_model", model_folders["reward"], "--max_new_tokens", 6000, "--max_seq_len", 8000)
    yield server
    code, log = server.stop()
    assert (code, "Traceback" in log) == (0, False), log


def test_the_official_client(server, endless, model_folders):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120)
    assert [model.id for model in client.models.list()] == [endless, model_folders["lm"]]
    assert client.models.retrieve(endless).id == endless

    # A stream is the same answer in pieces, and says how many tokens it had.
    asked = dict(model=endless, messages=[{"role": "system", "content": "Be kind."},
                                          {"role": "user", "content": [{"type": "text", "text": "Hello!"}]}])
    whole = client.chat.completions.create(**asked, max_tokens=30)
    stream = client.chat.completions.create(**asked, max_completion_tokens=30, stream=True,
                                            stream_options={"include_usage": True})
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    answer = whole.choices[0].message.content
    assert "".join(pieces) == answer and len([piece for piece in pieces if piece]) > 5
    assert whole.choices[0].finish_reason == "length" == chunks[-2].choices[0].finish_reason
    assert whole.usage.completion_tokens == 30 and whole.usage == chunks[-1].usage
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 30

    # A stop string is nowhere in the answer, not even in part, and ends it.
    stop = answer[len(answer) // 2:][:4]
    expected = answer[:answer.index(stop)].strip()
    for settings in (dict(stop=stop), dict(stop=["never said", stop])):
        cut = client.chat.completions.create(**asked, max_tokens=30, **settings)
        assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == (expected, "stop")
        assert cut.usage.completion_tokens < 30
    pieces = client.chat.completions.create(**asked, max_tokens=30, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == expected

    # A seed says the same again, beside others too; another says something else.
    def sampled(seed, top_p=1.0):
        drawn = client.chat.completions.create(**asked, max_tokens=30, temperature=1.0, seed=seed, top_p=top_p)
        return drawn.choices[0].message.content
    alone = sampled(1)
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(sampled, [1, 2, 1, 3])).count(alone) == 2
    assert sampled(1, top_p=1e-6) == answer, "of the likeliest token alone"

    with pytest.raises(openai.NotFoundError, match="there is no model") as caught:
        client.chat.completions.create(model="gpt-4", messages=asked["messages"])
    assert caught.value.code == "model_not_found"


def test_greedy_answers_are_those_of_the_terminal(server, model_folders, capsys):
    """Eight at once, in one batch, against transformers' generate, which chat.py's conversation streams."""
    model = model_folders["lm"]
    with ThreadPoolExecutor() as pool:
        choices = list(pool.map(lambda question: server.ask(model, question, max_tokens=40), QUESTIONS))
    config = chat.Config(path=[model], reward_model=model_folders["reward"], max_new_tokens=40)
    speaker = chat.Speaker(model, config)
    judge = chat.Judge(config, [speaker])
    for question, choice in zip(QUESTIONS, choices):
        messages = [{"role": "user", "content": question}]
        prompt, answer, text = speaker.answer(messages)
        assert choice["message"]["content"] == text
        # the field beyond the protocol
        found = judge.measures(speaker, messages, prompt, answer, text)
        assert choice["score"] == pytest.approx(found["score"], abs=1e-3) and "kl" in choice


def test_eight_clients_at_once_are_faster_than_one_after_another(server, endless):
    def ask(question):
        return server.ask(endless, question, max_tokens=200)["message"]["content"]

    ask("warm up")
    ratios = []
    for _ in range(3):  # the best of three, because other programs use this machine too
        began = time.time()
        alone = [ask(question) for question in QUESTIONS]
        one_after_another = time.time() - began
        began = time.time()
        with ThreadPoolExecutor(len(QUESTIONS)) as pool:
            together = list(pool.map(ask, QUESTIONS))
        ratios.append(one_after_another / (time.time() - began))
        assert together == alone
        if ratios[-1] > 2:
            break
    print(f"8 clients at once: {max(ratios):.1f} times as fast as one after another")
    assert max(ratios) > 1.5, ratios


def test_what_is_refused(server, endless):
    good = {"model": endless, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 2}
    deep = b'{"model": ' + 100_000 * b"["
    half = json.dumps({**good, "messages": [{"role": "user", "content": "\ud800"}]}).encode()
    cases = [
        (413, bytes(10 * 2**20), "larger than 1048576 bytes"), (400, b"{", "no JSON"), (400, b"", "no JSON"),
        (400, b"\xff\xfe", "no JSON"), (400, deep, "no JSON"), (400, b"[]", "JSON list"), (400, half, "content"),
        (400, json.dumps({"\ud800": 1}).encode(), "not known here"),
        (404, {**good, "model": "gpt-4"}, f"there is {endless}"), (400, {"messages": good["messages"]}, "model null"),
        (400, {**good, "messages": []}, "one or more"), (400, {**good, "messages": "Hello!"}, "one or more"),
        (400, {**good, "messages": [{"role": "robot", "content": "Hi"}]}, '"robot": system, developer, user, assi'),
        (400, {**good, "messages": [{"role": "user", "content": 3}]}, "content 3"),
        (400, {**good, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts of type text"),
        (400, {**good, "messages": good["messages"] + [{"role": "assistant", "content": "Hi"}]}, "assistant's own"),
        (400, {**good, "messages": [{"role": "user", "content": 9000 * "one "}]}, "takes 8000 in all"),
        (400, {**good, "max_tokens": 8001}, "max_tokens 8001: an integer from 1 to 8000"),
        (400, {**good, "max_tokens": 0}, "from 1"), (400, {**good, "temperature": -1}, "temperature -1"),
        (400, {**good, "temperature": float("nan")}, "NaN"), (400, {**good, "temperature": 1e-300}, "0 takes"),
        (400, {**good, "temperature": True}, "true"), (400, {**good, "top_p": 0}, "top_p 0"),
        (400, {**good, "stop": ["a", "b", "c", "d", "e"]}, "at most 4"), (400, {**good, "stop": ""}, "empty"),
        (400, {**good, "n": 2}, "n 2: this server does only 1"), (400, {**good, "stream": "yes"}, "stream"),
        (400, {**good, "tools": [{}]}, "tools"), (400, {**good, "temprature": 1}, '"temprature" is not known')]
    for status, body, said in cases:
        got, answer = server.post(body)
        assert (got, set(answer)) == (status, {"error"}), (said, answer)
        assert set(answer["error"]) == {"message", "type", "param", "code"} and said in answer["error"]["message"]
        assert answer["error"]["type"] == "invalid_request_error"
    assert server.post(b"{}", "/v1/completions")[0] == 404 and server.post(b"{}", "/v1/models")[0] == 405
    status, answer = server.post(good)
    assert status == 200 and answer["usage"]["completion_tokens"] == 2, "the server goes on"


def test_a_client_that_leaves_frees_its_place(server, endless):
    connections = [server.begin(endless, question) for question in QUESTIONS]
    server.wait_for(endless, 8)
    status, answer = server.post({"model": endless, "messages": [{"role": "user", "content": "Hi"}]})
    assert (status, answer["error"]["type"]) == (429, "rate_limit_error"), answer
    assert "--max_concurrency" in answer["error"]["message"]

    connections.pop().close()
    server.wait_for(endless, 7)
    assert server.ask(endless, max_tokens=3)["finish_reason"] == "length"
    for connection in connections:
        connection.close()
    server.wait_for(endless, 0)

    # One that waits for a whole answer too.
    waiting = socket.create_connection(("127.0.0.1", server.port))
    body = json.dumps({"model": endless, "messages": [{"role": "user", "content": "Hi"}]})
    waiting.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}"
                    .encode())
    server.wait_for(endless, 1)
    waiting.close()
    server.wait_for(endless, 0)


# -----------------------------------------------------------------------------
# the page

@pytest.fixture
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def test_the_page_compares_two_models(server, browser, endless, model_folders):
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def texts(selector):
        return browser.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map(element => element.textContent)", selector)

    def wait(condition):
        WebDriverWait(browser, 60, poll_frequency=0.05).until(lambda _: condition())

    def say(text):
        browser.find_element("css selector", "textarea").send_keys(text, Keys.ENTER)

    browser.get(server.url)
    wait(lambda: texts("h2") == [endless, model_folders["lm"]])

    # It streams: the endless model's answer grows while it is being made, and Stop ends it on the server too.
    say("<b>Hello!</b>")
    wait(lambda: texts("button[type=submit]") == ["Stop"] and len(texts(".assistant")[0]) > 20)
    wait(lambda: texts(".note")[1])  # the other one has answered
    length = len(texts(".assistant")[0])
    wait(lambda: len(texts(".assistant")[0]) > length)
    browser.find_element("css selector", "button[type=submit]").click()
    wait(lambda: texts("button[type=submit]") == ["Send"])
    server.wait_for(endless, 0)
    assert texts(".note")[0] == "Stopped, and forgotten."
    assert texts(".user") == 2 * ["<b>Hello!</b>"], "what is typed is text and no HTML"

    # The second model answered as it does to others, with its score and its KL to the first.
    expected = server.ask(model_folders["lm"], "<b>Hello!</b>")
    assert texts(".assistant")[1] == expected["message"]["content"]
    assert re.match(rf"score {expected['score']:.2f} · KL {expected['kl']:.2f} nats · ", texts(".note")[1])

    # A second question goes on with the conversation; New forgets it.
    browser.execute_script("models.splice(0, 1)")  # the endless one would take minutes
    for exchanges in (2, 1):
        say("Bye!")
        wait(lambda: texts("button[type=submit]") == ["Send"] and texts("section:last-child .note")[-1])
        again = texts("section:last-child .assistant")[-1]
        assert len(browser.execute_script("return models[0].messages")) == 2 * exchanges
        browser.find_element("id", "reset").click()
        wait(lambda: texts("section:last-child .turn") == [])
    assert again == server.ask(model_folders["lm"], "Bye!")["message"]["content"]

    # Nothing is cut off on a phone, and the browser had nothing to complain of.
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            dict(width=390, height=844, deviceScaleFactor=1, mobile=True))
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.get_log("browser") == []


# -----------------------------------------------------------------------------
# beginning and end

@pytest.mark.slow
def test_ctrl_c_ends_the_server_in_the_middle_of_an_answer(endless, tmp_path, run_script):
    server = Server(tmp_path / "log", "--path", endless, "--max_new_tokens", 6000, "--max_seq_len", 8000)
    try:
        connection = server.begin(endless)
        code, said = run_script("chat.py", "--path", endless, "--serve", "--port", server.port)
        assert code == 2 and f"--port {server.port}: nothing can listen there" in said and "Traceback" not in said
    finally:
        began = time.time()
        code, log = server.stop()
    assert b"the server is ending" in connection.sock.makefile("rb").read(), "the client is told why"
    connection.close()
    assert code == 0 and "Traceback" not in log and "the server has ended" in log, log
    assert time.time() - began < 15
