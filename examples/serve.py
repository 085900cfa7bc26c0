"""A page and a server: `python examples/serve.py`, then http://127.0.0.1:8000 in a browser.

    GET /                       the page, page.html: a picture, a question, the answer drawn as it comes
    GET /health                 503 while the model is loaded and warmed, then 200
    GET /v1/models              as the OpenAI API has it, and so is
    POST /v1/chat/completions   whose answers have `boxes` beyond it: label, pixels, mask as a PNG in base64
    POST /ask                   the same question; what comes of it token by token, for the page

One thread owns the model and answers what waits, up to eight questions at once; each connection has a thread
that reads the question and writes the answer. PaliGemma has no conversation: the last user message is the
question, with its own pictures, and what stands before it is ignored, a system message too.
"""
import base64
import binascii
import codecs
import contextlib
import hmac
import io
import ipaddress
import itertools
import json
import os
import queue
import re
import secrets
import selectors
import socket
import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
import vlm  # first, because it says what is not installed
import numpy as np
from PIL import Image
from show import attention_weights
from vlm import Fault

HERE = Path(__file__).resolve().parent
SIZES = 1, 2, 4, 8       # rows of a batch: others are filled up, so that few programs serve all
TEXT, ANSWER, STEP = 32, 256, 256  # tokens: room for a usual prompt and answer, and by what a cache grows
WATCHED = 64             # tokens of prompt and answer in the usual pass that watches the attention
WAITING = 32             # questions in the queue
PICTURES, BODY, BODIES = 16, 32 << 20, 256 << 20  # of a request; bytes of a request, and of all at once
CONNECTIONS, SILENCE, READING = 256, 30, 120      # at once; seconds without a byte, and for a whole request
POLL = getattr(selectors, "PollSelector", selectors.SelectSelector)  # Windows has the second only
SOON = {"Retry-After": "1"}
RARE = 8                 # programs of unusual shapes that are kept
FORMATS = "PNG", "JPEG", "WEBP", "GIF"
PICTURE = re.compile(r"data:(?:image/(?:png|jpe?g|webp|gif))?(?:;[\w.=-]+)*;base64,", re.I)
POLICY = ("default-src 'none'; img-src 'self' data: blob:; style-src 'unsafe-inline'; "
          "script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
          "frame-ancestors 'none'")
KNOWN = {"messages", "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed",
         "stop", "stream", "stream_options"}
HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# What the API can do and PaliGemma cannot, with the values that ask for nothing.
NOTHING = {"n": 1, "frequency_penalty": 0, "presence_penalty": 0, "logprobs": False, "top_logprobs": 0,
           "logit_bias": {}, "tools": [], "tool_choice": "none", "parallel_tool_calls": True,
           "response_format": {"type": "text"}, "modalities": ["text"]}


class Refusal(Exception):
  """Why a request is not answered, as the API says it."""
  def __init__(self, status, message, param=None, code=None, **headers):
    super().__init__(message)
    kind = {429: "rate_limit_error"}.get(status, "server_error" if status >= 500 else "invalid_request_error")
    self.status, self.headers = status, headers
    self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


# ---- 1. A question ----


def read_picture(url, param, side):
  """A data: URL -> float32 (3, S, S), and the picture's width and height. Nothing else is ever opened.
  Raises Refusal."""
  found = isinstance(url, str) and PICTURE.match(url)
  if not found:
    raise Refusal(400, "a picture is a data: URL of a png, jpeg, webp or gif in base64; paths and other "
                  "addresses are not opened", param)
  try:
    data = re.sub(r"\s|=+$", "", url[found.end():])
    data = base64.b64decode(data + "=" * (-len(data) % 4), validate=True)
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
      image = vlm.open_image(image)
    return vlm.to_pixels(image, side)[0], image.size
  except Exception as e:  # Pillow's readers raise whatever they stumble over
    why = {binascii.Error: "not base64", Image.DecompressionBombError: "too large"}.get(type(e))
    raise Refusal(400, f"the picture is {why or 'not of these kinds, or damaged'}", param,
                  "invalid_image") from None


def read_message(body):
  """-> the pictures' URLs, each with its place, and the text of the last user message. Raises Refusal."""
  messages = body.get("messages")
  if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
    raise Refusal(400, "messages is a list of objects with role and content", "messages")
  asked = [i for i, message in enumerate(messages) if message.get("role") == "user"]
  if not asked:
    raise Refusal(400, "messages has none of the user", "messages")
  place, urls, texts = f"messages[{asked[-1]}].content", [], []
  content = messages[asked[-1]].get("content")
  parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
  for i, part in enumerate(parts if isinstance(parts, list) else [None]):
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
      texts.append(part["text"])
    elif kind == "image_url":
      url = part.get("image_url")
      urls.append((url.get("url") if isinstance(url, dict) else url, f"{place}[{i}].image_url"))
    else:
      raise Refusal(400, "content is a text, or a list of parts of type text and image_url", place)
  if not 1 <= len(urls) <= PICTURES:
    raise Refusal(400, f"the last user message has {len(urls)} pictures; it needs 1 to {PICTURES}, as parts "
                  "of type image_url", place)
  prompt = " ".join(filter(None, (text.strip() for text in texts)))
  if not prompt:
    raise Refusal(400, "the last user message has no text", place)
  return urls, prompt


def number(body, name, kind, low, high, default=None):
  """A number of a request; null is the default. Raises Refusal."""
  value = body.get(name)
  if value is None:
    return default
  if isinstance(value, bool) or not isinstance(value, (int, kind)) or not low <= value <= high:
    what = "a whole number" if kind is int else "a number"
    raise Refusal(400, f"{name} is {what} from {low:g} to {high:g}", name)
  return kind(value)


class Question:
  """One row of a batch: what was asked, checked, and the queue of what comes of it: ("token", id, text),
  ("codes", 16 codes, logits (64, 64)), ("end", "stop" or "length", seconds), ("attention", uint8 (N, P)),
  ("over",), or ("error", exception) or ("left",)."""
  def __init__(self, model, body, connection, watched):
    self.connection, self.watched = connection, watched
    odd = [key for key in body if key not in KNOWN | HARMLESS and body[key] is not None
           and not (key in NOTHING and body[key] == NOTHING[key])]
    if odd:
      raise Refusal(400, f"{odd[0]}: this server cannot do that; leave it out", odd[0],
                    "unsupported_parameter")
    if body.get("model") not in (None, name := model_name(model)):
      raise Refusal(404, f"there is no such model here; there is {name}", "model", "model_not_found")
    for key, kind in (("stream", bool), ("stream_options", dict)):
      if not isinstance(body.get(key), kind | None):
        raise Refusal(400, f"{key} is not what the API has there", key)
    urls, prompt = read_message(body)
    try:
      self.prompt = model.tokenizer.prompt(prompt)
    except Fault as e:
      raise Refusal(400, str(e), "messages") from None
    config = model.config
    self.pictures, self.image_tokens = len(urls), config.vision.patches * len(urls)
    room = config.text.max_position_embeddings - self.image_tokens - len(self.prompt)
    if room < 1:
      raise Refusal(400, f"{self.image_tokens} tokens of pictures and {len(self.prompt)} of text do not fit "
                    f"into the context of {config.text.max_position_embeddings}; shorten the text, or send fewer "
                    "pictures", "messages", "context_length_exceeded")
    asked = [number(body, key, int, 1, 2 ** 53) for key in ("max_completion_tokens", "max_tokens")]
    options = {"top_k": number(body, "top_k", int, 0, 2 ** 31, 0),
               "top_p": number(body, "top_p", float, 1e-6, 1, 1.0),
               "temperature": number(body, "temperature", float, 0, 100, 0.0)}
    seed = number(body, "seed", int, -2 ** 63, 2 ** 64 - 1)
    try:
      self.sampling = vlm.Sampling(max_tokens=min(asked[0] or asked[1] or ANSWER, room), **options)
    except Fault:
      raise Refusal(400, "temperature is 0, or from 1e-6", "temperature") from None
    self.rng = np.random.default_rng(None if seed is None else seed % 2 ** 64)
    stop = body.get("stop")
    self.stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(self.stop, list) or not all(isinstance(s, str) and s for s in self.stop) \
        or len(self.stop) > 4:
      raise Refusal(400, "stop is a text, or a list of up to four", "stop")
    self.pixels, sizes = zip(*(read_picture(url, param, config.vision.image_size) for url, param in urls))
    self.size = sizes[0]  # that boxes are in
    self.events, self.utf8 = queue.SimpleQueue(), codecs.getincrementaldecoder("utf-8")(errors="replace")
    self.tokens, self.held, self.codes, self.live, self.reason = [], "", (), True, None
    self.began, self.done = None, threading.Event()

  def left(self):
    """Whether who asked has gone."""
    try:
      with POLL() as poll:
        poll.register(self.connection, selectors.EVENT_READ)
        return bool(poll.select(0)) and not self.connection.recv(1, socket.MSG_PEEK)
    except (OSError, ValueError):  # a closed one has no number any more
      return True

  def drop(self, *why):
    self.live = self.watched = False
    self.events.put(why)
    self.done.set()

  def take(self, id, tokenizer, eos):
    """The next token -> the 16 codes of a mask that it completes, or None."""
    end, self.began = id in eos, self.began or time.perf_counter()
    piece = b"" if end else tokenizer.piece(id)
    self.tokens += [] if end else [id]
    full = len(self.tokens) == self.sampling.max_tokens
    self.held += self.utf8.decode(piece, final=end or full)
    cut = min((self.held.find(s) for s in self.stop if s in self.held), default=None)
    sure = len(self.held) if end or full else self.unsettled()
    text, self.held = self.held[:sure if cut is None else cut], self.held[sure:]
    if text or not end:
      self.events.put(("token", None if end else id, text))
    if end or full or cut is not None:
      self.reason = "length" if full and cut is None and not end else "stop"
    code = re.fullmatch(rb"<seg(\d{3})>", piece)
    self.codes = (*self.codes, int(code[1])) if code else ()
    return self.codes if len(self.codes) == 16 else None

  def unsettled(self):
    """Where in the text something begins that may become a stop."""
    ends = [len(self.held) - n for s in self.stop for n in range(1, len(s)) if self.held.endswith(s[:n])]
    return min(ends, default=len(self.held))


# ---- 2. The model's thread ----


class Waiting:
  """The questions that nobody answers yet."""
  def __init__(self):
    self.questions, self.changed = [], threading.Condition()

  def add(self, question):
    with self.changed:
      if len(self.questions) >= WAITING:
        for gone in [other for other in self.questions if other.left()]:
          self.questions.remove(gone)
          gone.drop("left")
      if len(self.questions) >= WAITING:
        raise Refusal(429, f"{WAITING} questions are waiting already; try again", code="queue_full", **SOON)
      self.questions.append(question)
      self.changed.notify()

  def batch(self, context):
    """Waits -> up to eight questions with as many pictures as the first, which fit the context together."""
    with self.changed:
      while not self.questions:
        self.changed.wait()
      before = 0
      while before < len(self.questions) < SIZES[-1]:  # those who ask together are a moment apart
        before = len(self.questions)
        self.changed.wait(.004)
      chosen = []
      for question in list(self.questions):
        if len(chosen) < SIZES[-1] and question.pictures == self.questions[0].pictures \
            and shape([*chosen, question], context)[0] >= longest([*chosen, question]):
          chosen.append(question)
      self.questions = [question for question in self.questions if question not in chosen]
    return chosen


def longest(rows):
  return max(len(row.prompt) for row in rows)


def shape(rows, context):
  """-> T, the slots for text, and C, all of a cache: few different ones, so that few programs are needed."""
  P, most = rows[0].image_tokens, max(row.sampling.max_tokens for row in rows)
  T = min(max(TEXT, 1 << (longest(rows) - 1).bit_length()), context - P - most)
  need = P + T + most
  C = -(-need // STEP) * STEP if need <= 4 * STEP else 1 << (need - 1).bit_length()
  return T, min(C, context)


def prefill(model, rows):
  """VLM.prefix for rows of tokens, with the sizes of `shape` -> token (B,), logits (B, V), positions (B, C)
  on the device, the next slot."""
  P, (T, C) = rows[0].image_tokens, shape(rows, model.config.text.max_position_embeddings)
  image = np.concatenate([model.vision(pixels)[1] for row in rows for pixels in row.pixels])
  ids = np.array([[0] * (T - len(row.prompt)) + row.prompt for row in rows])
  positions = vlm.layout([len(row.prompt) for row in rows], P, T, C)
  image = vlm.upload(image.reshape(len(rows), P, -1), model.device)
  token, logits = model.prefill(image, ids, positions)
  return token, logits, vlm.upload(positions, model.device), P + T


def answer(model, masks, rows):
  """Each row as it would be alone. Ends when all have ended or left."""
  filled = rows + rows[-1:] * (next(size for size in SIZES if size >= len(rows)) - len(rows))
  token, logits, positions, slot = prefill(model, filled)
  for step in itertools.count():
    if step:
      token, logits = model.decode(token, slot + step - 1, positions)
    token, drawn = token.numpy(), None
    for i, row in enumerate(rows):
      if row.live and row.left():
        row.drop("left")
      elif row.live and token[i] < 0:
        raise Fault("the logits are NaN: the weights are damaged, or too large for their number type", code=1)
      elif row.live:
        if row.sampling.temperature:
          drawn = logits.numpy() if drawn is None else drawn
          token[i] = row.sampling.draw(drawn[i], row.rng)
        codes = row.take(int(token[i]), model.tokenizer, model.config.eos)
        if codes and masks.path:
          row.events.put(("codes", codes, masks.logits(codes)))
        if row.reason:
          row.live = False
          row.events.put(("end", row.reason, time.perf_counter() - row.began))
          row.done.set()
    if not any(row.live for row in rows):
      return


def attention(model, row):
  """What chose each of N tokens: attention over P image tokens, mean of heads and layers -> uint8 (N, P),
  each to its own largest. This is the pass of examples/show.py as one program, kept for the next answer."""
  c, gemma, P = model.config.text, model.net.language_model, row.image_tokens
  lengths = len(row.prompt), len(row.tokens)
  T = min(max(WATCHED, 1 << (sum(lengths) - 1).bit_length()), c.max_position_embeddings - P)
  sequence = vlm.collate(c, P, [(row.prompt, row.tokens)], T)
  ids, _, *rest = (vlm.upload(t, model.device) for t in sequence)
  image = vlm.upload(np.concatenate([model.vision(pixels)[1] for pixels in row.pixels])[None], model.device)
  def run(image, ids, full, sliding, cos, sin):
    maps, plain = [], vlm.attention
    def watched(q, k, v, scale, mask, softcap):
      # Only the text asks. Not contiguous: a part of an input would be that of the first call, for ever.
      asked = q[:, :, P:].contiguous(), k, scale, mask[:, :, :, P:], softcap
      maps.append(attention_weights(*asked)[..., :P].mean(1).contiguous())
      return plain(q, k, v, scale, mask, softcap)
    vlm.attention = watched
    try:
      gemma(image.cat(gemma.embed(ids), dim=1), cos, sin, (full, sliding))
    finally:
      vlm.attention = plain
    return (sum(maps) / len(maps)).contiguous()
  key = "attention", P, T
  if key not in model.programs:
    source = Path(vlm.__file__).read_text()  # a program that is kept on disk is of this vlm.py
    model.programs[key] = vlm.capture(run, model.device, key, model.config, source)
  maps = model.programs[key](image, ids, *rest).numpy()[0, lengths[0] - 1:sum(lengths) - 1]
  return np.uint8(.5 + 255 * maps / np.maximum(maps.max(1, keepdims=True), maps.max() / 4).clip(1e-30))


def forget(model, usual):
  """Programs and caches of unusual shapes, when there are too many of them."""
  if len(model.programs) > len(usual) + RARE:
    model.programs = {key: program for key, program in model.programs.items() if key in usual}
    kept = {(key[1], key[-1]) for key in usual if key[0] == "prefill"}
    model.caches = {key: cache for key, cache in model.caches.items() if key in kept}


def work(model, masks, waiting, usual):
  """Answers what waits, for ever."""
  while True:
    rows = [row for row in waiting.batch(model.config.text.max_position_embeddings)]
    for gone in [row for row in rows if row.left()]:
      rows.remove(gone)
      gone.drop("left")
    try:
      with model.turns:
        if rows:
          answer(model, masks, rows)
        for row in rows:
          if row.watched and row.tokens and not row.left():
            row.events.put(("attention", attention(model, row)))
          row.events.put(("over",))
        forget(model, usual)
    except Exception as e:  # whatever it is, the next question is another one
      vlm.log.critical(f"serve: {e or type(e).__name__}")
      for row in rows:
        row.drop("error", e)


def warm(model, masks):
  """Runs every program that usual questions need -> their keys."""
  blank = {"messages": [{"role": "user", "content": [{"type": "text", "text": "caption en"}, {
    "type": "image_url", "image_url": "data:;base64," + base64.b64encode(SHAPES.read_bytes()).decode()}]}]}
  for done, size in enumerate(SIZES):
    vlm.terminal.bar(done, len(SIZES) + 1, f"warming: {size} question{'s' * (size > 1)} at once")
    rows = [Question(model, blank | {"temperature": 1, "seed": 0}, None, False) for _ in range(size)]
    token, logits, positions, slot = prefill(model, rows)
    token, logits = model.decode(token.numpy(), slot, positions)
    token.numpy(), logits.numpy()
  vlm.terminal.bar(len(SIZES), len(SIZES) + 1, "warming: masks and attention")
  if masks.path:
    masks.logits((0,) * 16)
  rows[0].tokens = [0]
  attention(model, rows[0])
  vlm.terminal.bar(1, 1, "ready")
  return set(model.programs)


# ---- 3. The server ----


SHAPES, PAGE = HERE / "shapes.png", HERE / "page.html"


def model_name(model):
  return model.folder.resolve().name


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
  """A thread for each connection. model: None until it can answer. When there are too many connections the
  oldest of those that have not asked anything is closed."""
  daemon_threads, request_queue_size = True, 1024
  allow_reuse_address = os.name == "posix"  # elsewhere it would let two servers have one port

  def __init__(self, args):
    self.args, self.model, self.waiting, self.created = args, None, Waiting(), int(time.time())
    self.open, self.reading, self.lock, self.bytes = set(), {}, threading.Lock(), 0
    self.decoding = threading.Semaphore(2)  # pictures: a large one takes much memory until it is small
    self.address_family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    try:
      super().__init__((args.host, args.port), Handler)
    except (OSError, OverflowError) as e:
      raise Fault(f"{args.host}, port {args.port}: {getattr(e, 'strerror', None) or e}; choose another --port "
                  "or --host", code=1) from None
    self.address = f"http://{f'[{args.host}]' if ':' in args.host else args.host}:{self.server_address[1]}"

  def process_request(self, request, client_address):
    with self.lock:
      if len(self.open) >= CONNECTIONS and self.reading:
        with contextlib.suppress(OSError):
          oldest = next(iter(self.reading))
          del self.reading[oldest]
          oldest.shutdown(socket.SHUT_RDWR)
      self.open.add(request)
      self.reading[request] = True
    super().process_request(request, client_address)

  def shutdown_request(self, request):
    with self.lock:
      self.open.discard(request)
      self.reading.pop(request, None)
    super().shutdown_request(request)

  def handle_error(self, request, client_address):
    e = sys.exception() if hasattr(sys, "exception") else sys.exc_info()[1]
    if not isinstance(e, OSError):  # a client that has gone
      vlm.log.critical(f"serve: {type(e).__name__}: {e}")

  @contextlib.contextmanager
  def room(self, size):
    """For a request's body: who sends many large ones has to wait. Raises Refusal."""
    with self.lock:
      if self.bytes + size > BODIES:
        raise Refusal(429, "too much is being sent at once; try again", code="queue_full", **SOON)
      self.bytes += size
    try:
      yield
    finally:
      with self.lock:
        self.bytes -= size


class Handler(BaseHTTPRequestHandler):
  protocol_version, timeout, server_version, sys_version = "HTTP/1.1", SILENCE, "vlm", ""

  # What the base class finds wrong is said as everything else.
  def send_error(self, code, message=None, explain=None):
    status = {501: 405, 505: 400}.get(code, code)
    self.close_connection, self.request_version = True, "HTTP/1.1"  # which the request may not have named
    self.send(status, Refusal(status, message or "bad request").body)

  def log_message(self, *args):
    pass

  def parse_request(self):
    try:
      return super().parse_request()
    except TimeoutError:
      self.send_error(408, "the request did not end")
      return False

  def finish(self):
    """What a client is still sending is read and thrown away, or it would never see the answer."""
    with contextlib.suppress(OSError, ValueError):
      self.wfile.flush()
      self.connection.shutdown(socket.SHUT_WR)
      self.connection.settimeout(1)
      end = time.monotonic() + 10
      while time.monotonic() < end and self.connection.recv(1 << 16):
        pass
    with contextlib.suppress(OSError):
      super().finish()

  def do_GET(self):
    self.answer("GET")

  def do_POST(self):
    self.answer("POST")

  def do_OPTIONS(self):
    self.answer("OPTIONS")

  def answer(self, method):
    self.began = False
    try:
      self.check(method)
      path = urlsplit(self.path).path
      if path not in ROUTES:
        raise Refusal(404, "there is nothing here", code="not_found")
      if method == "OPTIONS" and self.server.args.allow_origin:
        return self.send(204, b"")
      allowed, respond = ROUTES[path]
      if method != allowed:
        raise Refusal(405, f"{path} takes {allowed} only", code="method_not_allowed", Allow=allowed)
      respond(self)
    except Refusal as e:
      self.fail(e)
    except OSError:  # gone
      self.close_connection = True
    except Exception as e:
      vlm.log.critical(f"serve: {type(e).__name__}: {e}")
      self.fail(Refusal(500, "the server failed"))

  def fail(self, refusal):
    self.close_connection = True
    with contextlib.suppress(OSError):
      if self.began:
        self.event(refusal.body)
      else:
        self.send(refusal.status, refusal.body, **refusal.headers)

  def check(self, method):
    """Whether the request comes from where it may: a page elsewhere must not use this server by its visitor's
    browser, neither by sending to it nor by a name that leads to it. Raises Refusal."""
    args, hosts = self.server.args, self.headers.get_all("Host", [])
    if method != "POST" and {"Content-Length", "Transfer-Encoding"} & set(self.headers):
      self.close_connection = True  # nobody reads that body
    host = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]/@\s]+)(:\d{1,5})?", hosts[0] if len(hosts) == 1 else "")
    if not host:
      raise Refusal(400, "a request has one Host")
    name = host[1].strip("[]").lower()
    known = {"localhost", "127.0.0.1", "::1", args.host.lower()}
    if name not in known and not (args.host in ("0.0.0.0", "::") and is_number(name)):
      raise Refusal(403, f"this is not {host[1]}; open {self.server.address}, or start with --host",
                    code="wrong_host")
    origin = self.headers.get("Origin")
    if origin not in (None, f"http://{hosts[0]}", args.allow_origin) and args.allow_origin != "*":
      raise Refusal(403, "pages of other servers may not ask here; start with --allow-origin",
                    code="wrong_origin")
    given = self.headers.get("Authorization", "").removeprefix("Bearer ").encode(errors="replace")
    if args.api_key and method != "OPTIONS" and urlsplit(self.path).path.startswith(("/v1", "/ask")) \
        and not hmac.compare_digest(given, args.api_key.encode()):
      raise Refusal(401, "the API key is missing or wrong", code="invalid_api_key",
                    **{"WWW-Authenticate": "Bearer"})

  def send(self, status, body, kind="application/json", **headers):
    body = json.dumps(body).encode() if isinstance(body, dict) else body
    self.begin(status, kind, **headers, **({"Content-Length": len(body)} if status != 204 else {}))
    self.wfile.write(body)

  def begin(self, status, kind, **headers):
    self.began = True
    self.send_response(status)
    if self.server.args.allow_origin:
      headers |= {"Access-Control-Allow-Origin": self.server.args.allow_origin, "Vary": "Origin",
                  "Access-Control-Allow-Headers": "Authorization, Content-Type",
                  "Access-Control-Allow-Methods": "GET, POST"}
    headers |= {"Content-Type": kind, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    for name, value in headers.items():
      self.send_header(name, str(value))
    if self.close_connection:
      self.send_header("Connection", "close")
    self.end_headers()

  def event(self, data):
    self.wfile.write(b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n")

  # -- what is sent by GET --

  def page(self):
    self.send(200, PAGE.read_bytes(), "text/html; charset=utf-8", **{"Content-Security-Policy": POLICY})

  def shapes(self):
    self.send(200, SHAPES.read_bytes(), "image/png")

  def health(self):
    model = self.server.model
    if model is None:
      raise Refusal(503, "loading", code="loading", **SOON)
    note = vlm.read_json(model.folder / "config.json").get("note")
    self.send(200, {"status": "ok", "model": model_name(model), "note": note,
                    "key": bool(self.server.args.api_key), "side": round(model.config.vision.patches ** .5)})

  def models(self):
    if self.server.model is None:
      return self.health()
    self.send(200, {"object": "list", "data": [{"id": model_name(self.server.model), "object": "model",
                                                "created": self.server.created, "owned_by": "vlm"}]})

  # -- what is asked by POST --

  def body(self):
    """-> the JSON object that was sent. Raises Refusal."""
    if self.headers.get_content_type() != "application/json":
      raise Refusal(415, "send application/json", code="unsupported_media_type")
    lengths = self.headers.get_all("Content-Length", [])
    if not lengths or "Transfer-Encoding" in self.headers:
      raise Refusal(411, "send Content-Length, and no Transfer-Encoding")
    if len(lengths) > 1 or not re.fullmatch(r"\d{1,15}", lengths[0], re.ASCII):
      raise Refusal(400, "Content-Length is not a number")
    size = int(lengths[0])
    if size > BODY:
      raise Refusal(413, f"a request has at most {BODY >> 20} MB", code="request_too_large")
    with self.server.room(size):
      data, end = bytearray(), time.monotonic() + READING
      try:
        while len(data) < size and time.monotonic() < end:
          more = self.rfile.read1(min(1 << 16, size - len(data)))
          if not more:
            raise Refusal(400, f"the body has {len(data)} bytes, not {size}")
          data += more
      except TimeoutError:
        pass
      if len(data) < size:
        raise Refusal(408, "the request did not end")
      try:
        body = json.loads(data, parse_constant=lambda name: None)
      except (ValueError, RecursionError):
        raise Refusal(400, "the body is not JSON") from None
    if not isinstance(body, dict):
      raise Refusal(400, "the body is not a JSON object")
    return body

  def ask(self, watched=False):
    """-> the request, and the question, which waits to be answered. Raises Refusal."""
    if self.server.model is None:
      raise Refusal(503, "loading", code="loading", **SOON)
    body = self.body()
    with self.server.decoding:
      question = Question(self.server.model, body, self.connection, watched)
    with self.server.lock:
      self.server.reading.pop(self.connection, None)
    self.server.waiting.add(question)
    return body, question

  def events(self, question):
    """What comes of a question, as far as it is wanted. Raises Refusal of a failure, OSError where the client
    has gone."""
    last = "over" if question.watched else "end"
    event = [None]
    while event[0] != last:
      event = question.events.get()
      if event[0] == "error":
        raise Refusal(500, str(event[1]) if isinstance(event[1], Fault) else "the server failed")
      if event[0] == "left":
        raise ConnectionAbortedError
      yield event

  def chat(self):
    body, question = self.ask()
    stream, usage = body.get("stream"), (body.get("stream_options") or {}).get("include_usage")
    start = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()),
             "model": model_name(self.server.model)}
    def chunk(delta, reason=None, **more):
      choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
      more |= {"usage": None} if usage else {}
      self.event(start | {"object": "chat.completion.chunk", "choices": [choice]} | more)
    text, reason, found = "", None, Objects(self.server, question)
    if not stream:  # or each token would wake this thread, for which the model's would have to wait
      question.done.wait()
    for kind, *values in self.events(question):
      if stream and not self.began:
        self.close_connection = True
        self.begin(200, "text/event-stream")
        chunk({"role": "assistant", "content": ""})
      if kind == "token":
        text += values[1]
        if stream and values[1]:
          chunk({"content": values[1]})
      elif kind == "codes":
        found.masks[values[0]] = values[1]
      elif kind == "end":
        reason = values[0]
    counts = {"prompt_tokens": question.image_tokens + len(question.prompt),
              "completion_tokens": len(question.tokens)}
    counts["total_tokens"] = sum(counts.values())
    boxes = [entry for _, entry in found.new(text)]
    if not stream:
      choice = {"index": 0, "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None, "finish_reason": reason}
      whole = {"object": "chat.completion", "choices": [choice], "usage": counts, "boxes": boxes}
      return self.send(200, start | whole)
    chunk({}, reason, boxes=boxes)
    if usage:
      self.event(start | {"object": "chat.completion.chunk", "choices": [], "usage": counts})
    self.event(b"[DONE]")

  def watch(self):
    _, question = self.ask(watched=True)
    text, found = "", Objects(self.server, question)
    self.close_connection = True
    for kind, *values in self.events(question):
      if not self.began:
        self.begin(200, "text/event-stream")
      if kind == "token":
        text += values[1]
        self.event({"token": values[1], "id": values[0]})
      elif kind == "codes":
        found.masks[values[0]] = values[1]
      elif kind == "attention":
        self.event({"attention": [base64.b64encode(row.tobytes()).decode() for row in values[0]]})
      for i, entry in found.new(text):
        self.event({"object": i} | entry)
      if kind == "end":
        reason, seconds = values
        self.event({"end": reason, "tokens": len(question.tokens), "seconds": seconds, "text": text})


class Objects:
  """The boxes of an answer as it comes. masks: {codes: logits} that are known."""
  def __init__(self, server, question):
    self.size, self.masks, self.draw, self.told = question.size, {}, vlm.beside("draw"), {}

  def new(self, text):
    """-> (number, entry of draw.py) of each box that is other than it was told; a mask is told once."""
    for i, box in enumerate(vlm.parse_boxes(text, *self.size)):
      logits = self.masks.get(box.codes)
      if self.told.get(i) != (box.label, logits is not None):
        first = logits is not None and not self.told.get(i, (0, False))[1]
        mask = self.draw.paste(logits, box.box, *self.size) if first else None
        self.told[i] = box.label, logits is not None
        yield i, self.draw.entry(box, mask)


def is_number(name):
  with contextlib.suppress(ValueError):
    return bool(ipaddress.ip_address(name))


ROUTES = {"/": ("GET", Handler.page), "/shapes.png": ("GET", Handler.shapes),
          "/health": ("GET", Handler.health), "/v1/models": ("GET", Handler.models),
          "/v1/chat/completions": ("POST", Handler.chat),
          "/ask": ("POST", Handler.watch)}


# ---- 4. Command line ----


@vlm.program
def main(argv):
  p = vlm.terminal.ArgumentParser(prog="serve.py", allow_abbrev=False,
                                  description="A page, and a server that speaks the OpenAI API.")
  p.add_argument("--host", default="127.0.0.1", help="where to listen (default: %(default)s, this machine)")
  p.add_argument("--port", type=int, default=8000, help="0: any free one (default: %(default)s)")
  p.add_argument("--api-key", metavar="KEY", help="what clients have to know")
  p.add_argument("--allow-origin", metavar="ORIGIN", help="a page that may ask too, or * (default: none)")
  vlm.add_arguments(p, answers=False)
  args = p.parse_args(argv)
  with Server(args) as server:  # which says so while the model is loaded
    threading.Thread(target=server.serve_forever, daemon=True).start()
    model = vlm.open_model(args)
    masks = vlm.beside("draw").Masks(model.folder, model.device)
    usual = warm(model, masks)
    server.model = model
    print(server.address, flush=True)
    vlm.log.setLevel(max(vlm.log.level, 20))  # of each answer's stages nobody waits for here
    work(model, masks, server.waiting, usual)


if __name__ == "__main__":
  sys.exit(main())
