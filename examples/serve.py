"""A page and a server: `python examples/serve.py`, then http://127.0.0.1:8000 in a browser.

    GET /                       the page, page.html: a picture, a question, the answer drawn as it comes
    GET /health                 503 while the model is loaded and warmed, then 200
    GET /v1/models              as the OpenAI API has it, and so is
    POST /v1/chat/completions   whose answers have `boxes` beyond it: label, pixels, mask as a PNG in base64
    POST /ask                   the same question; what comes of it token by token, for the page

One thread owns the model and answers what waits, up to eight questions at once; each connection has a thread
that reads one request and writes its answer. PaliGemma has no conversation: the last user message is the
question, with its own pictures, and what stands before it is ignored, a system message too.
"""
import base64
import codecs
import collections
import contextlib
import io
import itertools
import json
import os
import queue
import re
import secrets
import socket
import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
import vlm  # first, because it says what is not installed
import numpy as np
from PIL import Image
import show
from vlm import Fault

PAGE, SHAPES = (Path(__file__).resolve().with_name(name) for name in ("page.html", "shapes.png"))
SIZES = 1, 2, 4, 8       # rows of a batch: others are filled up, so that few programs serve all
TEXT, ANSWER = 32, 256   # tokens: room for a usual prompt and answer
WATCHED = 64             # tokens of prompt and answer that one pass which watches the attention has room for
RARE = 8                 # programs of unusual shapes that are kept
WAITING = 32             # questions in the queue
PICTURES, BODY = 16, 32 << 20  # most of a request; bytes of one
CONNECTIONS, SILENCE = 64, 30  # that have not asked yet; seconds without a byte
PICTURE = re.compile(r"data:(?:image/(?:png|jpe?g|webp|gif))?(?:;[\w.=-]+)*;base64,", re.I)
POLICY = ("default-src 'none'; img-src 'self' data: blob:; style-src 'unsafe-inline'; connect-src 'self'; "
          "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
KNOWN = {"messages", "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed",
         "stop", "stream", "stream_options", "user", "metadata", "store"}  # the last three change no answer
NOTHING = {"n": 1, "response_format": {"type": "text"}}  # asks for nothing beyond what there is
SOON = {"Retry-After": 1}


# ---- 1. A question ----


class Refusal(Exception):
  """Why a request is not answered, as the API says it."""
  def __init__(self, message, param=None, code=None, status=400, **headers):
    super().__init__(message)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    kind = "rate_limit_error" if status == 429 else kind
    self.status, self.headers = status, headers
    self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def need(right, *why, **more):
  if not right:
    raise Refusal(*why, **more)


def read_picture(url, param, side):
  """A data: URL -> float32 (3, S, S), and the picture's width and height. Nothing else is ever opened.
  Raises Refusal."""
  found = isinstance(url, str) and PICTURE.match(url)
  need(found, "a picture is a data: URL in base64; no path and no other address is opened", param)
  try:
    data = base64.b64decode(url[found.end():] + "==")  # which some leave out; too many do no harm
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP", "GIF")) as image:
      image = vlm.open_image(image)
    return vlm.to_pixels(image, side)[0], image.size
  except Exception:  # Pillow's readers raise whatever they stumble over
    raise Refusal("the picture is damaged, too large, or no png, jpeg, webp or gif", param) from None


def read_message(messages):
  """-> the URLs of the last user message's pictures, each with its place in the request, and its text. Raises
  Refusal."""
  right = isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
  need(right, "messages is a list of objects with role and content", "messages")
  asked = [i for i, message in enumerate(messages) if message.get("role") == "user"]
  need(asked, "messages has none of the user", "messages")
  place, urls, texts = f"messages[{asked[-1]}].content", [], []
  content = messages[asked[-1]].get("content")
  parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
  for i, part in enumerate(parts if isinstance(parts, list) else [None]):
    part = part if isinstance(part, dict) else {}
    url = part.get("image_url")
    if part.get("type") == "image_url":
      urls.append((url.get("url") if isinstance(url, dict) else url, f"{place}[{i}].image_url"))
    else:
      right = part.get("type") == "text" and isinstance(part.get("text"), str)
      need(right, "content is a text, or a list of parts of type text and image_url", place)
      texts.append(part["text"].strip())
  prompt = " ".join(filter(None, texts))
  need(prompt, "the last user message has no text", place)
  need(1 <= len(urls) <= PICTURES, f"the last user message has {len(urls)} pictures; it needs 1 to "
       f"{PICTURES}, as parts of type image_url", place)
  return urls, prompt


def number(body, name, kind, low, high):
  """A number of a request, None where there is none. Raises Refusal."""
  value = body.get(name)
  if value is None:
    return None
  right = isinstance(value, (int, kind)) and not isinstance(value, bool) and low <= value <= high
  need(right, f"{name} is a {'whole ' * (kind is int)}number from {low:g} to {high:g}", name)
  return kind(value)


class Question:
  """One row of a batch: what is asked, and what comes of it, from the model's thread through a queue to that
  of its connection. client: a socket that does not wait. Raises Refusal."""
  def __init__(self, model, body, client, watched=False):
    for key, value in body.items():
      able = key in KNOWN or not value or value == NOTHING.get(key)
      need(able, f"{key}: this server cannot do that; leave it out", key, "unsupported_parameter")
    name, stop, seed = model_name(model), body.get("stop"), number(body, "seed", int, -2 ** 63, 2 ** 64 - 1)
    need(body.get("model") in (None, name), f"there is no such model here; there is {name}", "model",
         "model_not_found", 404)
    self.stream, options = body.get("stream") or False, body.get("stream_options") or {}
    need(isinstance(self.stream, bool), "stream is true or false", "stream")
    need(isinstance(options, dict), "stream_options is an object", "stream_options")
    self.stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    right = isinstance(self.stop, list) and all(s and isinstance(s, str) for s in self.stop)
    need(right and len(self.stop) <= 4, "stop is a text, or a list of up to four", "stop")
    most = [number(body, key, int, 1, 2 ** 53) for key in ("max_completion_tokens", "max_tokens")]
    urls, self.asked = read_message(body.get("messages"))
    vision, context = model.config.vision, model.config.text.max_position_embeddings
    self.pictures, self.image_tokens = len(urls), vision.patches * len(urls)
    try:
      self.prompt = model.tokenizer.prompt(self.asked)
      room = context - self.image_tokens - len(self.prompt)
      need(room > 0, f"{self.image_tokens} tokens of pictures and {len(self.prompt)} of text do not fit into "
           f"the context of {context}; shorten the text, or send fewer pictures", "messages")
      self.sampling = vlm.Sampling(max_tokens=min(most[0] or most[1] or ANSWER, room),
                                   temperature=number(body, "temperature", float, 0, 100) or 0.0,
                                   top_k=number(body, "top_k", int, 0, 2 ** 31) or 0,
                                   top_p=number(body, "top_p", float, 1e-6, 1) or 1.0)
    except Fault as e:
      raise Refusal(str(e)) from None
    self.pixels, sizes = zip(*(read_picture(url, param, vision.image_size) for url, param in urls))
    self.size = sizes[0]  # that boxes are in
    self.rng = np.random.default_rng(None if seed is None else seed % 2 ** 64)
    self.client, self.watched, self.usage = client, watched, options.get("include_usage")
    self.tokens, self.text, self.held, self.codes, self.masks = [], "", "", (), {}
    self.utf8, self.began = codecs.getincrementaldecoder("utf-8")(errors="replace"), None
    self.queue, self.live, self.done, self.reason = queue.SimpleQueue(), True, threading.Event(), None

  def left(self):
    """Whether who asked has gone."""
    try:
      return not self.client.recv(1, socket.MSG_PEEK)
    except BlockingIOError:  # nothing more has come from there
      return False
    except OSError:
      return True

  def close(self, why=None):
    """Nothing more comes. why: an exception, if the answer is not whole."""
    self.live = False
    self.queue.put(why)
    self.done.set()

  def take(self, id, model, masks):
    """The next token."""
    end, self.began = id in model.config.eos, self.began or time.perf_counter()
    piece = b"" if end else model.tokenizer.piece(id)
    self.tokens += [] if end else [id]
    last = end or len(self.tokens) == self.sampling.max_tokens
    self.held += self.utf8.decode(piece, final=last)
    stops = [self.held.find(s) for s in self.stop if s in self.held]
    sure = min(stops) if stops else len(self.held) if last else self.settled()
    text, self.held = self.held[:sure], self.held[sure:]
    self.text += text
    code = re.fullmatch(rb"<seg(\d{3})>", piece)
    self.codes = (*self.codes, int(code[1])) if code else ()
    if len(self.codes) == 16 and masks.path:
      self.masks[self.codes] = masks.logits(self.codes)
    if text or not end:
      self.queue.put({"token": text, "id": None if end else id})
    if last or stops:
      self.live, self.reason = False, "stop" if end or stops else "length"
      self.queue.put({"end": self.reason, "tokens": len(self.tokens), "text": self.text,
                      "seconds": time.perf_counter() - self.began})
    if not self.live and not self.watched:
      self.close()

  def settled(self):
    """How much of the text cannot become a stop any more."""
    starts = [len(self.held) - n for s in self.stop for n in range(1, len(s)) if self.held.endswith(s[:n])]
    return min(starts, default=len(self.held))

  def events(self):
    """Yields what comes, as /ask sends it: {"token", "id"}; {"object", "label", "box"} of the box that has
    this number, again when its label grows, and once with its "mask"; {"end", "tokens", "text", "seconds"};
    if it is watched, {"attention"}, of each token uint8 (P,). Raises Refusal, OSError if the client left."""
    draw, text, told = vlm.beside("draw"), "", {}
    for event in iter(self.queue.get, None):
      if isinstance(event, Exception):
        raise event
      yield event
      text += event.get("token", "")
      for i, box in enumerate(vlm.parse_boxes(text, *self.size)):
        logits, (label, drawn) = self.masks.get(box.codes), told.get(i, (None, False))
        if box.label != label or drawn != (logits is not None):
          told[i] = box.label, logits is not None
          mask = draw.paste(logits, box.box, *self.size) if logits is not None and not drawn else None
          yield {"object": i} | draw.entry(box, mask)


# ---- 2. The model's thread ----


class Waiting:
  """The questions that nobody answers yet."""
  def __init__(self):
    self.questions, self.changed = [], threading.Condition()

  def add(self, question):
    """Raises Refusal."""
    with self.changed:
      self.forget_gone()
      need(len(self.questions) < WAITING, f"{WAITING} questions are waiting already; try again", status=429,
           code="queue_full", **SOON)
      self.questions.append(question)
      self.changed.notify()

  def batch(self, context):
    """Waits -> up to eight questions with equally many pictures, which fit the context together; none where
    who asked has gone."""
    with self.changed:
      while not self.questions:
        self.changed.wait()
      before = 0
      while before < len(self.questions) < SIZES[-1]:  # those who ask together are a moment apart
        before = len(self.questions)
        self.changed.wait(.004)
      self.forget_gone()
      chosen = []
      for question in self.questions:
        rows = [*chosen, question]
        alike = question.pictures == rows[0].pictures and sum(needs(rows)) <= context
        chosen = rows if alike and len(rows) <= SIZES[-1] else chosen
      self.questions = [question for question in self.questions if question not in chosen]
    return chosen

  def forget_gone(self):
    for gone in [question for question in self.questions if question.left()]:
      self.questions.remove(gone)
      gone.close(ConnectionAbortedError())


def needs(rows):
  """-> how many tokens their pictures, their longest prompt and their longest answer have."""
  longest, most = max(len(row.prompt) for row in rows), max(row.sampling.max_tokens for row in rows)
  return rows[0].image_tokens, longest, most


def prefill(model, rows):
  """VLM.prefix for rows of tokens, T being at least TEXT, for few programs -> token (B,), logits (B, V),
  positions (B, C) on the device, the next slot."""
  (P, longest, most), context = needs(rows), model.config.text.max_position_embeddings
  T = min(max(TEXT, 1 << (longest - 1).bit_length()), context - P - most)
  C = P + T + most
  C = min(C + -C % 256, context)
  image = np.concatenate([model.vision(pixels)[1] for row in rows for pixels in row.pixels])
  ids = np.array([[0] * (T - len(row.prompt)) + row.prompt for row in rows])
  positions = vlm.layout([len(row.prompt) for row in rows], P, T, C)
  image = vlm.upload(image.reshape(len(rows), P, -1), model.device)
  token, logits = model.prefill(image, ids, positions)
  return token, logits, vlm.upload(positions, model.device), P + T


def answer(model, masks, rows):
  """Each row as it would be alone. Ends when all have ended or left."""
  size = next(size for size in SIZES if size >= len(rows))
  token, logits, positions, slot = prefill(model, rows + rows[-1:] * (size - len(rows)))
  for step in itertools.count():
    if step:
      token, logits = model.decode(token, slot + step - 1, positions)
    token = token.numpy()
    logits = logits.numpy() if any(row.live and row.sampling.temperature for row in rows) else None
    for i, row in enumerate(rows):
      if row.live and row.left():
        row.close(ConnectionAbortedError())
      elif row.live and token[i] < 0:
        raise Fault("the logits are NaN: the weights are damaged, or too large for their number type", code=1)
      elif row.live:
        if row.sampling.temperature:
          token[i] = row.sampling.draw(logits[i], row.rng)
        row.take(int(token[i]), model, masks)
    if not any(row.live for row in rows):
      return


def attention(model, row):
  """What chose each of N tokens: attention over P image tokens, mean of heads and layers -> uint8 (N, P),
  each to its own largest. As examples/show.py has it, but as one program, kept for the next answer."""
  inputs, [start] = show.sequences(model, [list(row.pixels)], [row.asked], [row.tokens], WATCHED)
  gemma, key = model.net.language_model, ("attention", *inputs[0].shape, *inputs[1].shape)
  def run(*inputs):
    maps = show.image_maps(gemma, *inputs)
    return (sum(maps) / len(maps)).contiguous()
  if key not in model.programs:
    sources = [Path(module.__file__).read_text() for module in (vlm, show)]  # that a kept program is made of
    model.programs[key] = vlm.capture(run, model.device, key, model.config, sources)
  maps = model.programs[key](*inputs).numpy()[0, start - 1:start - 1 + len(row.tokens)]
  return np.uint8(.5 + 255 * maps / np.maximum(maps.max(1, keepdims=True), maps.max() / 4).clip(1e-30))


def work(model, masks, waiting, usual):
  """Answers what waits, for ever. usual: keys of programs and caches to keep."""
  while True:
    rows = waiting.batch(model.config.text.max_position_embeddings)
    try:
      with model.turns:
        if rows:
          answer(model, masks, rows)
        for row in rows:
          if not row.done.is_set() and row.tokens and not row.left():
            maps = [base64.b64encode(line.tobytes()).decode() for line in attention(model, row)]
            row.queue.put({"attention": maps})
          row.close()
        if len(set(model.programs) - usual) > RARE:
          for kept in (model.programs, model.caches):  # together, since programs write into their caches
            for key in set(kept) - usual:
              del kept[key]
    except Exception as e:  # whatever it is, the next question is another one
      vlm.log.critical(f"serve: {e or type(e).__name__}")
      for row in rows:
        row.close(Refusal(str(e) if isinstance(e, Fault) else "the server failed", status=500))


def warm(model, masks):
  """Runs every program that usual questions need -> the keys of these and their caches."""
  url = "data:;base64," + base64.b64encode(SHAPES.read_bytes()).decode()
  parts = [{"type": "text", "text": "caption en"}, {"type": "image_url", "image_url": url}]
  row = Question(model, {"messages": [{"role": "user", "content": parts}]}, None)
  for done, size in enumerate(SIZES):
    vlm.terminal.bar(done, len(SIZES) + 1, f"warming: {size} question{'s' * (size > 1)} at once")
    token, _, positions, slot = prefill(model, [row] * size)
    token, logits = model.decode(token.numpy(), slot, positions)
    token.numpy(), logits.numpy()
  vlm.terminal.bar(len(SIZES), len(SIZES) + 1, "warming: masks and attention")
  if masks.path:
    masks.logits((0,) * 16)
  row.tokens = [0]
  attention(model, row)
  vlm.terminal.bar(1, 1, "ready")
  return {*model.programs, *model.caches}


# ---- 3. The server ----


def model_name(model):
  return model.folder.resolve().name


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
  """A thread for each connection. model: None until it can answer. silent: the connections that have not
  asked yet; of too many the oldest is closed."""
  daemon_threads, request_queue_size = True, 1024
  allow_reuse_address = os.name == "posix"  # elsewhere it would let two servers have one port

  def __init__(self, args):
    self.args, self.model, self.waiting, self.created = args, None, Waiting(), int(time.time())
    self.silent = collections.OrderedDict()
    self.decoding = threading.Semaphore(2)  # pictures: a large one takes much memory until it is small
    self.address_family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    try:
      super().__init__((args.host, args.port), Handler)
    except (OSError, OverflowError) as e:
      why = getattr(e, "strerror", None) or e
      raise Fault(f"{args.host}, port {args.port}: {why}; choose another --port or --host", code=1) from None
    self.address = f"http://{f'[{args.host}]' if ':' in args.host else args.host}:{self.server_address[1]}"

  def process_request(self, request, client_address):
    self.silent[request] = True
    if len(self.silent) > CONNECTIONS:
      with contextlib.suppress(OSError):  # it may just be closing
        self.silent.popitem(last=False)[0].shutdown(socket.SHUT_RDWR)
    super().process_request(request, client_address)

  def shutdown_request(self, request):
    self.silent.pop(request, None)
    super().shutdown_request(request)

  def handle_error(self, request, client_address):
    pass  # a client that has gone: Handler.respond tells of all else


class Handler(BaseHTTPRequestHandler):
  """One request of a connection."""
  protocol_version, timeout, server_version, sys_version = "HTTP/1.1", SILENCE, "vlm", ""

  def setup(self):
    super().setup()
    self.begun, self.watch = False, self.connection.dup()
    self.watch.setblocking(False)  # for Question.left

  def finish(self):
    """What a client is still sending is read and thrown away, or it would never see the answer."""
    self.watch.close()
    with contextlib.suppress(OSError):
      self.connection.shutdown(socket.SHUT_WR)
      self.connection.settimeout(1)
      end = time.monotonic() + 10
      while time.monotonic() < end and self.connection.recv(1 << 16):
        pass
    super().finish()

  def log_message(self, *args):
    pass

  def parse_request(self):
    try:
      return super().parse_request()
    except TimeoutError:
      self.send_error(408, "the request did not end")

  def send_error(self, code, message=None, explain=None):
    """What the base class finds wrong, said as everything else."""
    self.request_version = "HTTP/1.1"  # which the request may not have named
    self.fail(Refusal(message or "bad request", status={501: 405, 505: 400}.get(code, code)))

  def respond(self):
    path = self.path.partition("?")[0]
    try:
      self.check(path)
      need(path in ROUTES, "there is nothing here", status=404)
      method, answer = ROUTES[path]
      if self.command == "OPTIONS" and self.server.args.allow_origin:  # a browser asks whether it may ask
        return self.begin(204)
      need(self.command == method, f"{path} takes {method} only", status=405, Allow=method)
      answer(self)
    except Refusal as e:
      self.fail(e)
    except OSError:  # the client has gone
      pass
    except Exception as e:
      vlm.log.critical(f"serve: {type(e).__name__}: {e}")
      self.fail(Refusal("the server failed", status=500))

  do_GET = do_POST = do_OPTIONS = respond

  def fail(self, refusal):
    with contextlib.suppress(OSError):
      if self.begun:
        self.event(refusal.body)
      else:
        self.send(refusal.status, refusal.body, **refusal.headers)

  def check(self, path):
    """Whether the request comes from where it may: a page elsewhere must not use this server by its visitor's
    browser, neither by sending to it nor by a name that leads to it. Raises Refusal."""
    args, hosts = self.server.args, self.headers.get_all("Host", [])
    need(len(hosts) == 1, "a request has one Host")
    name = re.sub(r":\d+$", "", hosts[0]).strip("[]").lower()
    number = ":" in name or name.replace(".", "").isdigit()  # an address, which is nobody's name
    open_to_all = number and args.host in ("0.0.0.0", "::")
    need(open_to_all or name in ("localhost", "127.0.0.1", "::1", args.host.lower()),
         f"this is not {hosts[0]}; open {self.server.address}, or start with --host", status=403)
    own = f"http://{hosts[0]}"
    need(self.headers.get("Origin", own) in (own, args.allow_origin) or args.allow_origin == "*",
         "pages of other servers may not ask here; start with --allow-origin", status=403)
    key = self.headers.get("Authorization", "").removeprefix("Bearer ").encode("latin-1")
    free = not args.api_key or self.command == "OPTIONS" or not path.startswith(("/v1", "/ask"))
    need(free or secrets.compare_digest(key, args.api_key.encode()), "the API key is missing or wrong",
         code="invalid_api_key", status=401, **{"WWW-Authenticate": "Bearer"})

  def begin(self, status, **headers):
    self.begun, origin = True, self.server.args.allow_origin
    self.send_response(status)
    headers |= {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Connection": "close"}
    if origin:
      headers |= {"Access-Control-Allow-Origin": origin, "Access-Control-Allow-Methods": "GET, POST",
                  "Access-Control-Allow-Headers": "Authorization, Content-Type", "Vary": "Origin"}
    for name, value in headers.items():
      self.send_header(name, str(value))
    self.end_headers()

  def send(self, status, body, kind="application/json", **headers):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    self.begin(status, **headers, **{"Content-Type": kind, "Content-Length": len(body)})
    self.wfile.write(body)

  def event(self, data):
    if not self.begun:
      self.begin(200, **{"Content-Type": "text/event-stream"})
    self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")

  def page(self):
    self.send(200, PAGE.read_bytes(), "text/html; charset=utf-8", **{"Content-Security-Policy": POLICY})

  def shapes(self):
    self.send(200, SHAPES.read_bytes(), "image/png")

  @property
  def model(self):
    need(self.server.model, "loading", code="loading", status=503, **SOON)
    return self.server.model

  def health(self):
    note = vlm.read_json(self.model.folder / "config.json").get("note")
    self.send(200, {"status": "ok", "model": model_name(self.model), "note": note,
                    "key": bool(self.server.args.api_key)})

  def models(self):
    self.send(200, {"object": "list", "data": [{"id": model_name(self.model), "object": "model",
                                                "created": self.server.created, "owned_by": "vlm"}]})

  def body(self):
    """-> the JSON object that was sent. Raises Refusal."""
    lengths = self.headers.get_all("Content-Length", [])
    need(self.headers.get_content_type() == "application/json", "send application/json", status=415)
    need(lengths and "Transfer-Encoding" not in self.headers, "send Content-Length, not chunks", status=411)
    need(len(lengths) == 1 and re.fullmatch("[0-9]{1,15}", lengths[0]), "Content-Length is not a number")
    length = int(lengths[0])
    need(length <= BODY, f"a request has at most {BODY >> 20} MB", status=413)
    try:
      data = self.rfile.read(length)
      body = json.loads(data) if len(data) == length else None
    except TimeoutError:
      raise Refusal("the request did not end", status=408) from None
    except (ValueError, RecursionError):
      body = None
    need(isinstance(body, dict), f"the body is not a JSON object of {length} bytes")
    return body

  def ask(self, watched=False):
    """-> the question, which waits to be answered. Raises Refusal."""
    model, body = self.model, self.body()
    with self.server.decoding:
      question = Question(model, body, self.watch, watched)
    self.server.silent.pop(self.connection, None)
    self.server.waiting.add(question)
    return question

  def tell(self):
    for event in self.ask(watched=True).events():
      self.event(event)

  def chat(self):
    question = self.ask()
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()),
            "model": model_name(self.model), "object": "chat.completion" + ".chunk" * question.stream}
    def choices(name, message, reason=None):
      return head | {"choices": [{"index": 0, name: message, "logprobs": None, "finish_reason": reason}]}
    more, boxes = {"usage": None} if question.usage else {}, {}
    if not question.stream:  # or each token would wake this thread, for which the model's would have to wait
      question.done.wait()
    for event in question.events():
      if question.stream and not self.begun:
        self.event(choices("delta", {"role": "assistant", "content": ""}) | more)
      if question.stream and event.get("token"):
        self.event(choices("delta", {"content": event["token"]}) | more)
      if "object" in event:
        boxes.setdefault(event.pop("object"), {}).update(event)
    prompt, answer = question.image_tokens + len(question.prompt), len(question.tokens)
    usage = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
    boxes = {"boxes": list(boxes.values())}
    if not question.stream:
      message = {"role": "assistant", "content": question.text, "refusal": None}
      return self.send(200, choices("message", message, question.reason) | {"usage": usage} | boxes)
    self.event(choices("delta", {}, question.reason) | more | boxes)
    if question.usage:
      self.event(head | {"choices": [], "usage": usage})
    self.wfile.write(b"data: [DONE]\n\n")


ROUTES = {"/": ("GET", Handler.page), "/shapes.png": ("GET", Handler.shapes),
          "/health": ("GET", Handler.health), "/v1/models": ("GET", Handler.models),
          "/v1/chat/completions": ("POST", Handler.chat), "/ask": ("POST", Handler.tell)}


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
