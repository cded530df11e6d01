"""
A server for `chat.py --serve`: OpenAI's chat-completions protocol over this project's own decoder,
and a page to talk in a browser.

    GET  /                     the page (support/chat.html)
    GET  /v1/models            the models, by the names that --path gave them
    POST /v1/chat/completions  an answer, whole or ("stream": true) as it is made
    GET  /health               how many answers each model is making, and how many it can make

Requests that come while others are answered join their batch between two tokens, and leave it when
they end or their client is gone (hybrid_engine.RollingBatch): a thread for each model steps its
batch and speaks token ids, the event loop speaks text and HTTP.

What a request may say: model, messages (text; roles system, developer, user, assistant), stream,
stream_options.include_usage, max_tokens or max_completion_tokens, temperature, top_p, seed, stop.
What it leaves out has chat.py's flags as its default, so a request without a temperature is
answered as in the terminal. What does not change an answer (user, metadata, ..) is ignored, and all
else is refused, because a server that overlooks a setting gives other answers than were asked for.

Beyond the protocol a choice may have "score" and "kl", the measures of its answer's tokens that
chat.py's docstring defines; in a stream they are in the last choice, beside its finish_reason.

Refused are bodies over 1 MB (413), prompts and answers longer than the model takes (400), and more
requests at once than --max_concurrency for a model (429). Each model's KV cache is allocated when
the server starts: --max_concurrency rows of --max_seq_len tokens.
"""

import asyncio
import copy
import json
import math
import random
import socket
import threading
import time
import traceback
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from data import encode_prompts
from hybrid_engine import InferenceEngine, RollingBatch
from kernels.decoder import why_unsupported
from kernels.sampling import sample
from support.flags import UsageError, first_line
from support.models import vocabulary_size

MAX_BODY = 2**20  # bytes
DRAIN = 2**26  # bytes of a body too long that are read all the same, so that its sender listens
MAX_STOPS = 4
SHUTDOWN_SECONDS = 3  # that clients have after Ctrl-C to hear that their answers end

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Accepted with the value at which they do nothing.
NEUTRAL = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0, "logprobs": False,
           "logit_bias": {}, "tools": [], "response_format": {"type": "text"}}
KNOWN = {"model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens",
         "temperature", "top_p", "seed", "stop"}


class ApiError(Exception):
    """Becomes a response in OpenAI's form."""

    def __init__(self, status, message, param=None, code=None):
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error"
        if status >= 500:
            kind = "server_error"
        elif status == 429:
            kind = "rate_limit_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


ENDING = ApiError(503, "the server is ending", code="server_ending")


# -----------------------------------------------------------------------------
# what a request says

@dataclass
class ChatRequest:
    """A request that has been checked; see the protocol's names above."""
    served: "Served"
    messages: list
    stream: bool
    include_usage: bool
    max_tokens: int  # None: as many as there is room for
    temperature: float
    top_p: float
    seed: int  # None: the server draws one
    stops: list


def parse_request(raw, served_models, config):
    """
    Body in bytes -> ChatRequest.

    served_models  {name: Served}
    raises         ApiError that names what came and what is accepted
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON ({first_line(error)}); an object with model and "
                            "messages is needed") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is a JSON {type(body).__name__}; an object with model and "
                            "messages is needed")
    body = {name: value for name, value in body.items()
            if value is not None and name not in IGNORED}
    for name, value in body.items():
        if name in NEUTRAL and value != NEUTRAL[name]:
            raise ApiError(400, f"{name} {shown(value)}: this server does only {NEUTRAL[name]!r}; "
                                "leave it out", name)
        if name not in NEUTRAL and name not in KNOWN:
            raise ApiError(400, f"{shown(name)} is not known here; accepted are "
                                f"{', '.join(sorted(KNOWN))}", shown(name))

    model = body.get("model")
    if not isinstance(model, str):
        raise ApiError(400, f"model {shown(model)}: the name of a model is needed, one of "
                            f"{', '.join(served_models)}", "model")
    if model not in served_models:
        raise unknown_model(model, served_models)

    options = body.get("stream_options", {})
    if not isinstance(options, dict) or options.keys() - {"include_usage"}:
        raise ApiError(400, f"stream_options {shown(options)}: an object with include_usage alone "
                            "is accepted", "stream_options")
    limit = served_models[model].length
    lengths = [number(body, name, None, 1, limit, int)
               for name in ("max_completion_tokens", "max_tokens")]
    return ChatRequest(
        served=served_models[model],
        messages=parse_messages(body.get("messages")),
        stream=boolean(body, "stream"),
        include_usage=boolean(options, "include_usage"),
        max_tokens=lengths[0] or lengths[1],
        temperature=parse_temperature(body, config.temperature),
        top_p=number(body, "top_p", config.top_p, 1e-6, 1, float),
        seed=number(body, "seed", None, -2**63, 2**64 - 1, int),
        stops=parse_stops(body.get("stop", [])))


def shown(value):
    """A value of a request as an error shows it: in JSON, and not all of it."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + ".."


def unknown_model(model, served_models):
    return ApiError(404, f"there is no model {shown(model)} here; there is "
                         f"{', '.join(served_models)}", "model", "model_not_found")


def number(body, name, default, at_least, at_most, kind):
    """A number of the body, or the default where it has none."""
    value = body.get(name, default)
    if value is default:
        return default
    # "not <=", because JSON from Python may hold NaN; and True is an int there.
    of_kind = isinstance(value, (int, float) if kind is float else int)
    if not of_kind or isinstance(value, bool) or not at_least <= value <= at_most:
        word = "an integer" if kind is int else "a number"
        raise ApiError(400, f"{name} {shown(value)}: {word} from {at_least} to {at_most} is "
                            "accepted", name)
    return value


def parse_temperature(body, default):
    temperature = number(body, "temperature", default, 0, 2, float)
    if "temperature" in body and 0 < temperature < 0.01:
        raise ApiError(400, f"temperature {temperature}: so small a one leaves no probability but "
                            "that of the likeliest token; 0 takes that token", "temperature")
    return temperature


def boolean(body, name):
    value = body.get(name, False)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise ApiError(400, f"{name} {shown(value)}: true or false is accepted", name)
    return value


def parse_stops(stops):
    if isinstance(stops, str):
        stops = [stops]
    if (not isinstance(stops, list) or len(stops) > MAX_STOPS
            or not all(isinstance(stop, str) and stop for stop in stops)):
        raise ApiError(400, f"stop {shown(stops)}: a text or a list of at most {MAX_STOPS} texts "
                            "is accepted, none of them empty", "stop")
    return stops


def parse_messages(messages):
    """-> the messages, each {"role": system, user or assistant, "content": text}."""
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, f"messages {shown(messages)}: a list of one or more messages is "
                            'needed, [{"role": "user", "content": "Hi"}]', "messages")
    parsed = []
    for place, message in enumerate(messages):
        param = f"messages[{place}]"
        if not isinstance(message, dict):
            raise ApiError(400, f"{param} {shown(message)}: an object with role and content is "
                                "needed", param)
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise ApiError(400, f"{param}.role {shown(role)}: {', '.join(ROLES)} are accepted",
                           f"{param}.role")
        content = text_of(message.get("content"))
        if content is None:
            raise ApiError(400, f"{param}.content {shown(message.get('content'))}: a text, or a "
                                "list of parts of type text, is accepted", f"{param}.content")
        parsed.append({"role": ROLES[role], "content": content})
    if parsed[-1]["role"] == "assistant":
        raise ApiError(400, "the last of the messages is the assistant's own; one to answer is "
                            "needed behind it", "messages")
    return parsed


def text_of(content):
    """A message's content -> its text, or None where it is something else."""
    if isinstance(content, list):
        parts = [part.get("text") for part in content
                 if isinstance(part, dict) and part.get("type") == "text"]
        if len(parts) < len(content) or not all(isinstance(part, str) for part in parts):
            return None
        content = "".join(parts)
    if not isinstance(content, str):
        return None
    try:
        content.encode()
    except UnicodeEncodeError:  # half a pair of surrogates, which no tokenizer takes
        return None
    return content


# -----------------------------------------------------------------------------
# a model that is served

@dataclass(eq=False)
class Answer:
    """
    One request's answer in the making. The model's thread puts (token, finish_reason or None) into
    `events`, or an ApiError; the event loop sets `cancelled`.
    """
    prompt: list
    max_tokens: int
    temperature: float
    top_p: float
    random: random.Random
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    cancelled: bool = False
    count: int = 0  # tokens so far


class Served(threading.Thread):
    """
    One model behind the server, and the thread that generates with it.

    speaker  chat.Speaker
    rows     answers at once
    length   tokens of a conversation and its answer, at most
    """

    def __init__(self, speaker, rows, length):
        super().__init__(daemon=True)
        reason = why_unsupported(speaker.model)
        if reason:
            raise UsageError(f"--serve: this project's decoder cannot run {speaker.name}: "
                             f"{reason}. Talk to it without --serve.")
        self.speaker = speaker
        self.rows = rows
        self.length = min(length, speaker.positions)
        engine = InferenceEngine(speaker.model, vocabulary=vocabulary_size(speaker.tokenizer))
        self.batch = RollingBatch(engine, rows, self.length)
        self.ends = set(torch.tensor(speaker.ends).view(-1).tolist())
        # A tokenizer is not to be used by two threads at once, so the event loop has its own.
        self.tokenizer = copy.deepcopy(speaker.tokenizer)
        self.tokenizer_lock = threading.Lock()

        self.changed = threading.Condition()  # guards the three below
        self.waiting = []
        self.running = []  # in the order of the batch's rows
        self.closing = False

    # In the event loop, or a thread of its pool.

    def encode(self, request):
        """
        -> prompt ids, and how many tokens its answer may have. Raises ApiError where they do not
        fit, or the chat template refuses the messages.
        """
        with self.tokenizer_lock:
            try:
                _, (prompt,) = encode_prompts(self.speaker.tokenizer, [request.messages])
            except UsageError as error:
                raise ApiError(400, str(error), "messages") from None
        room = self.length - len(prompt)
        if room < (request.max_tokens or 1):
            raise ApiError(400, f"the messages have {len(prompt)} tokens and the answer may have "
                                f"{request.max_tokens or 1}; {self.speaker.name} takes "
                                f"{self.length} in all. Shorten one of them.", "messages",
                           "context_length_exceeded")
        return prompt, request.max_tokens or min(room, self.speaker.max_new_tokens)

    def submit(self, answer):
        """The answer joins the batch before its next step. Raises ApiError where it is full."""
        with self.changed:
            if self.closing:
                raise ENDING
            if self.count_answers() >= self.rows:
                raise ApiError(429, f"{self.speaker.name} is making {self.rows} answers, which is "
                                    "all that --max_concurrency allows; try again later",
                               code="rate_limit_exceeded")
            self.waiting.append(answer)
            self.changed.notify()

    def count_answers(self):
        """Answers that somebody waits for; a cancelled one keeps its row until the next step."""
        return sum(not answer.cancelled for answer in self.waiting + self.running)

    def close(self):
        """Ends the thread, and all answers in the making with an error."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        if self.is_alive():
            self.join()

    # In the model's own thread.

    def run(self):
        while True:
            with self.changed:
                while not (self.waiting or self.running or self.closing):
                    self.changed.wait()
                closing = self.closing
            if closing:
                self.fail(ENDING)
                return
            try:
                self.advance()
            except Exception as error:  # of any kind, because the server must outlive it
                traceback.print_exc()
                self.fail(ApiError(500, f"the model failed ({type(error).__name__}: "
                                        f"{first_line(error)})"))

    def advance(self):
        """One token for every answer in the making."""
        # 1. Whose client has gone leaves, and who waits joins.
        self.leave([answer.cancelled for answer in self.running])
        with self.changed:
            waiting = [answer for answer in self.waiting if not answer.cancelled]
            free = self.rows - len(self.running)
            newcomers = waiting[:free]
            self.waiting = waiting[free:]
            self.running += newcomers
        for answer in newcomers:
            self.batch.join(answer.prompt)
        if not self.running:
            return

        # 2. Each answer's next token, drawn at once for those with the same settings.
        tokens = torch.zeros(len(self.running), dtype=torch.long, device=self.batch.device)
        broken = torch.zeros_like(tokens, dtype=torch.bool)
        settings = [(answer.temperature, answer.top_p) for answer in self.running]
        for temperature, top_p in set(settings):
            rows = [row for row, own in enumerate(settings) if own == (temperature, top_p)]
            uniforms = [self.running[row].random.random() for row in rows]
            uniforms = torch.tensor(uniforms, device=self.batch.device)
            tokens[rows], logprobs = sample(self.batch.logits[rows], uniforms,
                                            temperature=temperature, top_p=top_p)
            broken[rows] = logprobs.isnan()

        # 3. What each means to its answer.
        events = []
        ended = []
        for answer, token, is_broken in zip(self.running, tokens.tolist(), broken.tolist()):
            answer.count += 1
            reason = None
            if token in self.ends:
                reason = "stop"
            elif answer.count == answer.max_tokens:
                reason = "length"
            event = (token, reason)
            if is_broken:
                event = ApiError(500, "the model's probabilities are no numbers (NaN): its weights "
                                      "have overflowed")
            events.append((answer, event))
            ended.append(reason is not None or is_broken)

        # 4. The ended leave, before they are told so: their clients may ask again at once. All
        # tokens go to the event loop in one call, and the others' into the model.
        tokens = tokens[torch.tensor(ended, device=tokens.device).logical_not()]
        self.leave(ended)
        deliver(events)
        if self.running:
            self.batch.step(tokens)

    def leave(self, leaving):
        """leaving: a bool for each of the running answers."""
        stay = [row for row, leaves in enumerate(leaving) if not leaves]
        with self.changed:
            self.running = [self.running[row] for row in stay]
        self.batch.keep(stay)

    def fail(self, error):
        """All answers end with the error, and the batch is empty again."""
        with self.changed:
            answers = self.running + self.waiting
            self.running = []
            self.waiting = []
        self.batch.clear()
        deliver([(answer, error) for answer in answers])


def deliver(events):
    """Pairs of an answer and what its queue in the event loop gets."""
    def put():
        for answer, event in events:
            answer.events.put_nowait(event)

    for answer, _ in events[:1]:  # all have the same loop
        answer.loop.call_soon_threadsafe(put)


# -----------------------------------------------------------------------------
# tokens -> text -> OpenAI's objects

async def text_pieces(answer, tokenizer, stops):
    """
    Yields (new text, finish_reason or None, the tokens so far) as the answer grows. Text is yielded
    once it is final: not in the middle of a letter, not what may become a stop string, not white
    space at the answer's end.
    """
    tokens = []
    yielded = ""
    reason = None
    while reason is None:
        event = await answer.events.get()
        if isinstance(event, ApiError):
            raise event
        token, reason = event
        tokens.append(token)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        places = [text.index(stop) for stop in stops if stop in text]
        if places:
            text = text[:min(places)]
            reason = "stop"
            answer.cancelled = True
        elif reason is None:
            text = text[:len(text) - unsure(text, stops)]
        text = text.strip()
        yield text[len(yielded):], reason, tokens
        yielded = text if len(text) > len(yielded) else yielded


def unsure(text, stops):
    """How many characters at the text's end may still change: of a stop string, of half a letter"""
    held = len(text) - len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
    for stop in stops:
        for length in range(1, len(stop)):
            if text.endswith(stop[:length]):
                held = max(held, length)
    return held


JUDGING = threading.Lock()  # one answer at a time: the judge's tokenizer is not for two threads


def measures(judge, request, prompt, tokens, text):
    """
    {"score", "kl"} of a finished answer, as chat.Judge has them, where they are numbers; in a
    thread of the pool.
    """
    device = request.served.speaker.model.device
    prompt = torch.tensor([prompt], device=device)
    answer = torch.tensor([tokens], device=device)
    with JUDGING:
        found = judge.measures(request.served.speaker, request.messages, prompt, answer, text)
    return {name: value for name, value in found.items() if math.isfinite(value)}


def usage(prompt, tokens):
    return {"prompt_tokens": len(prompt), "completion_tokens": len(tokens),
            "total_tokens": len(prompt) + len(tokens)}


class AnswerStream(StreamingResponse):
    """Server-sent events. The answer ends with them, also where the client has gone."""

    def __init__(self, events, answer):
        super().__init__(events, media_type="text/event-stream")
        self.answer = answer

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.cancelled = True


# -----------------------------------------------------------------------------
# the application

def make_app(served_models, judge, config):
    """
    served_models  {name: Served}, whose threads run
    config         chat.Config
    """
    page = (Path(__file__).parent / "chat.html").read_text(encoding="utf-8")
    started = int(time.time())
    seeds = random.Random(config.seed)  # for requests without one

    def model_object(name):
        return {"id": name, "object": "model", "created": started, "owned_by": "local"}

    async def show_page(request):
        return HTMLResponse(page)

    async def health(request):
        models = {name: {"answering": served.count_answers(), "max_concurrency": served.rows}
                  for name, served in served_models.items()}
        return JSONResponse({"status": "ok", "models": models})

    async def list_models(request):
        return JSONResponse({"object": "list", "data": [model_object(m) for m in served_models]})

    async def one_model(request):
        name = request.path_params["name"]
        if name not in served_models:
            raise unknown_model(name, served_models)
        return JSONResponse(model_object(name))

    async def chat_completions(http_request):
        request = parse_request(await read_body(http_request), served_models, config)
        served = request.served
        prompt, max_tokens = await asyncio.to_thread(served.encode, request)
        seed = seeds.getrandbits(32) if request.seed is None else request.seed
        answer = Answer(prompt, max_tokens, request.temperature, request.top_p,
                        random.Random(seed), asyncio.get_running_loop())
        served.submit(answer)
        pieces = text_pieces(answer, served.tokenizer, request.stops)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()),
                "model": served.speaker.name}
        if request.stream:
            return AnswerStream(stream(request, prompt, pieces, head), answer)

        # The whole answer. Meanwhile whoever asked may leave, which is all that can still arrive.
        whole = asyncio.create_task(complete(request, prompt, pieces, head))
        gone = asyncio.create_task(http_request.receive())
        try:
            await asyncio.wait([whole, gone], return_when=asyncio.FIRST_COMPLETED)
            return await whole if whole.done() else Response(status_code=499)
        finally:
            answer.cancelled = True
            whole.cancel()
            gone.cancel()

    async def complete(request, prompt, pieces, head):
        text = ""
        async for piece, reason, tokens in pieces:
            text += piece
        found = await asyncio.to_thread(measures, judge, request, prompt, tokens, text)
        choice = {"index": 0, "message": {"role": "assistant", "content": text},
                  "finish_reason": reason, "logprobs": None, **found}
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice],
                             "usage": usage(prompt, tokens)})

    async def stream(request, prompt, pieces, head):
        def event(delta, reason=None, **more):
            choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None, **more}
            return chunk([choice])

        def chunk(choices, **more):
            if request.include_usage:
                more = {"usage": None, **more}
            body = {**head, "object": "chat.completion.chunk", "choices": choices, **more}
            return f"data: {json.dumps(body)}\n\n"

        yield event({"role": "assistant", "content": ""})
        try:
            text = ""
            async for piece, reason, tokens in pieces:
                text += piece
                if piece:
                    yield event({"content": piece})
            found = await asyncio.to_thread(measures, judge, request, prompt, tokens, text)
        except ApiError as error:  # too late for a status
            yield f"data: {json.dumps(error.body)}\n\n"
            return
        yield event({}, reason, **found)
        if request.include_usage:
            yield chunk([], usage=usage(prompt, tokens))
        yield "data: [DONE]\n\n"

    routes = [Route("/", show_page), Route("/health", health), Route("/v1/models", list_models),
              Route("/v1/models/{name:path}", one_model),
              Route("/v1/chat/completions", chat_completions, methods=["POST"])]
    handlers = {ApiError: api_error, HTTPException: http_error, Exception: server_error,
                ClientDisconnect: nobody_listens}
    return Starlette(routes=routes, exception_handlers=handlers)


async def read_body(request):
    """The body in bytes. Raises ApiError where it is over MAX_BODY, which is never held."""
    body = bytearray()
    size = 0
    async for part in request.stream():
        size += len(part)
        if size <= MAX_BODY:
            body += part
        elif size > DRAIN:
            break
    if size > MAX_BODY:
        raise ApiError(413, f"the body is larger than {MAX_BODY} bytes, the most that is accepted")
    return bytes(body)


async def api_error(request, error):
    return JSONResponse(error.body, error.status)


async def http_error(request, error):
    message = f"{request.method} {request.url.path}: {error.detail}; there is GET /v1/models and " \
              "POST /v1/chat/completions"
    return JSONResponse(ApiError(error.status_code, message).body, error.status_code)


async def server_error(request, error):
    return JSONResponse(ApiError(500, f"{type(error).__name__}: {first_line(error)}").body, 500)


async def nobody_listens(request, error):
    return Response(status_code=499)


class Server(uvicorn.Server):
    """Ends the answers in the making before it waits for their connections to end."""

    def __init__(self, uvicorn_config, served_models):
        super().__init__(uvicorn_config)
        self.served_models = served_models

    async def shutdown(self, sockets=None):
        for served in self.served_models.values():
            served.close()
        await super().shutdown(sockets)


def serve(speakers, judge, config):
    """Answers requests until Ctrl-C."""
    served_models = {speaker.name: Served(speaker, config.max_concurrency, config.max_seq_len)
                     for speaker in speakers}
    listener = listen(config.host, config.port)
    app = make_app(served_models, judge, config)
    uvicorn_config = uvicorn.Config(app, log_level="warning", lifespan="off",
                                    timeout_graceful_shutdown=SHUTDOWN_SECONDS)
    for served in served_models.values():
        served.start()
    host = f"[{config.host}]" if ":" in config.host else config.host
    port = listener.getsockname()[1]
    print(f"http://{host}:{port} is a page to talk to {', '.join(served_models)}; OpenAI's clients "
          "take that address with /v1. Ctrl-C ends.", flush=True)
    try:
        Server(uvicorn_config, served_models).run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn raises it again after its own end
        pass
    print("\n(the server has ended)")


def listen(host, port):
    """A socket that listens. Raises UsageError where there can be none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # so that who reads the address and asks at once only has to wait
    except OSError as error:
        listener.close()
        raise UsageError(f"--host {host} --port {port}: nothing can listen there "
                         f"({error.strerror}); give another port (0: any that is free), or an "
                         "address of this machine.") from error
    return listener
