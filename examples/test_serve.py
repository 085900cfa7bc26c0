"""Tests of serve.py and page.html. `-k live` asks with the official openai client, and uses the page in a real browser
(chromium, driven by playwright; VLM_SHOTS names a folder for what it looks like)."""
import base64
import contextlib
import dataclasses
import functools
import importlib
import io
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import tinygrad.helpers
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import serve
import show
import vlm

EXAMPLES = ROOT / "examples"
PICTURES = [EXAMPLES / f"shapes{name}.png" for name in ("", "-one", "-two", "-four", "-overlap")]
DETECT = "detect red circle ; yellow star"


@pytest.fixture(scope="module", autouse=True)
def setting():
  """tinygrad's database of kernels belongs to the thread that opened it; here two use it, never at once."""
  shared = functools.partial(sqlite3.connect, check_same_thread=False)
  tinygrad.helpers._db_connection = None
  # Each size of a batch is two programs to compile: 2 and 4 rows are filled up here; test_program has all sizes.
  with mock.patch.object(sqlite3, "connect", shared), mock.patch.object(serve, "SIZES", (1, 8)):
    yield
  tinygrad.helpers._db_connection = None


@functools.cache
def toy():
  return vlm.load(ROOT / "weights" / "toy")


class Counted(serve.Waiting):
  """Knows how many were asked, and how many the model's thread has taken."""
  asked = taken = 0
  idle = False

  def add(self, question):
    super().add(question)
    self.asked += 1

  def batch(self, context):
    self.idle = True
    rows = super().batch(context)
    self.idle = False
    self.taken += len(rows)
    return rows


@contextlib.contextmanager
def serving(ready=True, **options):
  """A server on a free port, whose model is the toy."""
  args = SimpleNamespace(**{"host": "127.0.0.1", "port": 0, "api_key": None, "allow_origin": None} | options)
  with serve.Server(args) as server:
    server.waiting = Counted()
    threading.Thread(target=server.serve_forever, args=(.05,), daemon=True).start()
    if ready:
      masks = vlm.beside("draw").Masks(toy().folder, toy().device)
      usual = warmed()
      threading.Thread(target=serve.work, args=(toy(), masks, server.waiting, usual), daemon=True).start()
      server.model = toy()
    yield server
    server.shutdown()


@functools.cache
def warmed():
  return serve.warm(toy(), vlm.beside("draw").Masks(toy().folder, toy().device))


@pytest.fixture(scope="module")
def server():
  with serving() as server:
    yield server


def data_url(picture, kind="image/png"):
  return f"data:{kind};base64,{base64.b64encode(Path(picture).read_bytes()).decode()}"


def question(prompt=DETECT, picture=PICTURES[0], **more):
  """The body of a request."""
  pictures = picture if isinstance(picture, list) else [picture]
  urls = [path if str(path).startswith("data:") else data_url(path) for path in pictures]
  content = [{"type": "image_url", "image_url": {"url": url}} for url in urls] + [{"type": "text", "text": prompt}]
  return {"messages": [{"role": "user", "content": content}]} | more


def post(server, body, path="/v1/chat/completions", **headers):
  """-> status, headers, text."""
  data = body if isinstance(body, bytes) else json.dumps(body).encode()
  request = urllib.request.Request(server.address + path, data, {"Content-Type": "application/json"} | headers)
  try:
    with urllib.request.urlopen(request, timeout=60) as response:
      return response.status, response.headers, response.read().decode()
  except urllib.error.HTTPError as e:
    return e.code, e.headers, e.read().decode()


def ask(server, *words, **more):
  """-> the answer's JSON."""
  status, _, text = post(server, question(*words, **more))
  assert status == 200, text
  return json.loads(text)


def content(reply):
  return reply["choices"][0]["message"]["content"]


def events(text):
  return [json.loads(part[6:]) for part in text.split("\n\n") if part and part != "data: [DONE]"]


def raw(server, data, end=False, wait=20):
  """What a socket gets that sends these bytes -> status, 0 without one."""
  with socket.create_connection(server.server_address[:2], timeout=wait) as client:
    with contextlib.suppress(OSError):
      client.sendall(data)
      if end:
        client.shutdown(socket.SHUT_WR)
    got = b""
    with contextlib.suppress(OSError):
      while b"\r\n\r\n" not in got and (more := client.recv(65536)):
        got += more
  found = re.match(rb"HTTP/1\.[01] (\d{3}) ", got)
  return int(found[1]) if found else 0


def request(body=b"", *, start="POST /v1/chat/completions HTTP/1.1", host="localhost", kind="application/json", length=None,
            more=""):
  lines = [start, *([f"Host: {host}"] if host else []), *([f"Content-Type: {kind}"] if kind else [])]
  lines += [] if length == "" else [f"Content-Length: {len(body) if length is None else length}"]
  return ("\r\n".join(lines + more.split("\n") if more else lines) + "\r\n\r\n").encode() + body


@contextlib.contextmanager
def together(server, count):
  """What is asked inside waits until so many are there, and is one batch."""
  waiting, before = server.waiting, server.waiting.taken
  with ThreadPoolExecutor(1) as pool:
    with toy().turns:
      pool.submit(ask, server, max_tokens=1)  # for which the model's thread waits now
      until(lambda: waiting.taken == before + 1)
      before = waiting.asked
      yield
      until(lambda: waiting.asked == before + count)


@contextlib.contextmanager
def watch(monkeypatch):
  """How many rows the batches had."""
  sizes, plain = [], serve.answer
  monkeypatch.setattr(serve, "answer", lambda model, masks, rows: (sizes.append(len(rows)), plain(model, masks, rows)))
  yield sizes


@pytest.fixture
def endless(monkeypatch):
  """No answer ends by itself, or before a browser has had seconds to stop it."""
  monkeypatch.setattr(toy(), "config", dataclasses.replace(toy().config, eos=()))
  steps, plain = [], toy().decode
  monkeypatch.setattr(toy(), "decode", lambda *args: (steps.append(args), time.sleep(.02), plain(*args))[2])
  return steps


def until(true):
  """Waits for an event that only shows in a value."""
  end = time.monotonic() + 20
  while not true():
    assert time.monotonic() < end
    time.sleep(.002)

# ---- bad requests ----
GOOD = json.dumps(question()).encode()


def with_picture(url):
  return json.dumps(question(picture="data:") | {"messages": [{"role": "user", "content": [
    {"type": "image_url", "image_url": url}, {"type": "text", "text": "caption en"}]}]}).encode()


def bomb():
  data = io.BytesIO()
  Image.new("1", (20000, 20000)).save(data, "PNG")
  return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def bitmap():
  """Which Pillow could read, as it could what starts other programs."""
  data = io.BytesIO()
  Image.open(PICTURES[0]).save(data, "BMP")
  return "data:;base64," + base64.b64encode(data.getvalue()).decode()


def with_content(*messages):
  return json.dumps({"messages": messages}).encode()


BAD = {
  "no length": (411, request(GOOD, length="")),
  "chunked": (411, request(b"0\r\n\r\n", length="", more="Transfer-Encoding: chunked")),
  "length and chunked": (411, request(GOOD, more="Transfer-Encoding: chunked")),
  "length is no number": (400, request(GOOD, length="many")),
  "negative length": (400, request(GOOD, length="-5")),
  "two lengths": (400, request(GOOD, more="Content-Length: 5")),
  "33 MB": (413, request(b"x" * (33 << 20))),
  "33 MB, said only": (413, request(b"", length=33 << 20)),
  "a length beyond all": (413, request(b"", length="9" * 15)),
  "empty": (400, request(b"")),
  "not JSON": (400, request(b"{")),
  "not UTF-8": (400, request(b'{"messages": "\xff"}')),
  "no object": (400, request(b"[1]")),
  "deep JSON": (400, request(b"[" * 200000)),
  "a number of 5000 digits": (400, request(b'{"seed": ' + b"9" * 5000 + b"}")),
  "wrong type": (415, request(GOOD, kind="text/plain")),
  "a form": (415, request(GOOD, kind="application/x-www-form-urlencoded")),
  "no type": (415, request(GOOD, kind="")),
  "no Host": (400, request(GOOD, host="")),
  "wrong Host": (403, request(GOOD, host="evil.example:8000")),
  "a Host like ours": (403, request(GOOD, host="localhost.evil.example")),
  "two Hosts": (400, request(GOOD, more="Host: localhost")),
  "foreign Origin": (403, request(GOOD, more="Origin: http://evil.example")),
  "null Origin": (403, request(GOOD, more="Origin: null")),
  "own name, other port": (403, request(GOOD, more="Origin: http://localhost:1")),
  "foreign Origin, GET": (403, request(start="GET /health HTTP/1.1", length="", more="Origin: http://evil.example")),
  "no such path": (404, request(GOOD, start="POST /v1/nothing HTTP/1.1")),
  "a file of the disk": (404, request(start="GET /../serve.py HTTP/1.1", length="")),
  "GET of a POST": (405, request(start="GET /v1/chat/completions HTTP/1.1", length="")),
  "POST of a GET": (405, request(GOOD, start="POST /health HTTP/1.1")),
  "DELETE": (405, request(start="DELETE / HTTP/1.1", length="")),
  "OPTIONS": (405, request(start="OPTIONS /v1/chat/completions HTTP/1.1", length="")),
  "no HTTP": (400, b"hello there you\r\n\r\n"),
  "HTTP/9.0": (400, b"GET / HTTP/9.0\r\nHost: localhost\r\n\r\n"),
  "a long line": (414, b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"),
  "a long header": (431, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70000 + b"\r\n\r\n"),
  "200 headers": (431, b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: 1\r\n" * 200 + b"\r\n"),
  "a path": (400, request(with_picture({"url": "/etc/passwd"}))),
  "a file URL": (400, request(with_picture("file:///etc/passwd"))),
  "an address": (400, request(with_picture({"url": "http://127.0.0.1:1/a.png"}))),
  "an SVG": (400, request(with_picture("data:image/svg+xml;base64,PHN2Zy8+"))),
  "no base64": (400, request(with_picture("data:image/png;base64,%%%%"))),
  "no picture in it": (400, request(with_picture("data:image/png;base64,aGVsbG8="))),
  "half a picture": (400, request(with_picture(data_url(PICTURES[0])[:3000]))),
  "a picture of another kind": (400, request(with_picture(bitmap()))),
  "a bomb": (400, request(with_picture(bomb()))),
  "no messages": (400, request(b"{}")),
  "no user": (400, request(with_content({"role": "system", "content": "hello"}))),
  "no picture": (400, request(with_content({"role": "user", "content": "caption en"}))),
  "17 pictures": (400, request(json.dumps(question(picture=[PICTURES[0]] * 17)).encode())),
  "no text": (400, request(json.dumps(question(" ")).encode())),
  "half a character": (400, request(json.dumps(question("caption \ud800")).encode())),
  "audio": (400, request(with_content({"role": "user", "content": [{"type": "input_audio"}]}))),
  "a prompt beyond the context": (400, request(json.dumps(question("detect " + "circle ; " * 2000)).encode())),
} | {f"{key}: {value}": (400, request(json.dumps(question(**{key: value})).encode())) for key, value in (
  ("max_tokens", 0), ("max_tokens", "9"), ("max_tokens", 1.5), ("max_completion_tokens", -1), ("temperature", -1),
  ("temperature", "hot"), ("temperature", True), ("temperature", 1e-9), ("top_p", 0), ("top_p", 2), ("seed", .5),
  ("seed", 1e300), ("stop", ""), ("stop", ["a"] * 5), ("stop", [3]), ("stream", "yes"), ("stream_options", 1), ("n", 2),
  ("tools", [{"type": "function"}]), ("logprobs", True), ("unheard_of", 1), ("messages", "hello"), ("messages", [1]))}


@pytest.mark.parametrize("name", BAD)
def test_bad_request(server, name):
  status, data = BAD[name]
  assert raw(server, data) == status


def test_lies_about_the_length(server, monkeypatch):
  assert raw(server, request(GOOD, length=len(GOOD) + 9), end=True) == 400  # and the rest never comes
  monkeypatch.setattr(serve.Handler, "timeout", .2)
  assert raw(server, request(GOOD, length=len(GOOD) + 9)) == 408  # half a request and silence
  assert raw(server, b"GET / HTTP/1.1\r\nHost: loc") == 408
  assert raw(server, b"") == raw(server, b"GET /") == 0  # nothing was asked yet
  assert content(ask(server)).endswith("yellow star")


def test_errors_are_the_api_s(server):
  status, headers, text = post(server, question(temperature=-1))
  error = json.loads(text)["error"]
  assert (status, error["type"], error["param"], headers["Content-Type"]) == (
    400, "invalid_request_error", "temperature", "application/json")
  assert set(error) == {"message", "type", "param", "code"} and "0 to 100" in error["message"]
  assert post(server, b"x" * (33 << 20))[0] == 413  # seen by a client that first sends all
  status, _, text = post(server, question(model="gpt-4o"))
  assert status == 404 and json.loads(text)["error"]["code"] == "model_not_found" and "there is toy" in text
  status, _, text = post(server, question(picture=[PICTURES[0], "data:,hello"]))
  assert json.loads(text)["error"]["param"] == "messages[0].content[1].image_url"


def a_thousand(server):
  resource = pytest.importorskip("resource", reason="no limits of open files on Windows")
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
  return [socket.create_connection(server.server_address) for _ in range(1000)]


def test_a_thousand_connections(server):
  """Those that say nothing are closed when there are too many."""
  before = threading.active_count()
  clients = a_thousand(server)
  assert content(ask(server)).endswith("yellow star")
  assert threading.active_count() <= before + serve.CONNECTIONS + 1
  for client in clients:
    client.close()
  until(lambda: threading.active_count() <= before + 1 and not server.silent)

# ---- who may ask ----
def test_hosts_and_origins(server):
  port = server.server_address[1]
  def health(host, more=""):
    return raw(server, request(start="GET /health HTTP/1.1", host=host, length="", more=more))
  for host in ("localhost", "LOCALHOST:1", f"127.0.0.1:{port}", "[::1]", f"[::1]:{port}"):
    assert health(host) == 200
  assert health(f"localhost:{port}", f"Origin: http://localhost:{port}") == 200
  assert health("10.0.0.5") == 403
  _, headers, _ = post(server, question())
  assert not [name for name in headers if name.startswith("Access-Control")]


def test_other_hosts_and_origins_on_demand():
  with serving(host="0.0.0.0", api_key="open sesame", allow_origin="http://a.example") as server:
    server.address = server.address.replace("0.0.0.0", "127.0.0.1")
    def get(path, host="10.0.0.5", start="GET", more=""):
      return raw(server, request(start=f"{start} {path} HTTP/1.1", host=host, length="", more=more))
    assert get("/health") == get("/health", "0.0.0.0") == 200  # a number is nobody's name
    assert get("/health", "evil.example") == 403
    assert get("/health", more="Origin: http://a.example") == 200
    assert get("/health", more="Origin: http://b.example") == 403
    assert get("/ask", start="OPTIONS", more="Origin: http://a.example") == 204  # a browser asks without the key
    assert get("/v1/models") == 401 and get("/v1/models", more="Authorization: Bearer open sesame") == 200
    assert get("/") == 200
    for path in ("/ask", "/v1/chat/completions"):
      assert post(server, question(), path)[0] == post(server, question(), path, Authorization="Bearer x")[0] == 401
      status, headers, _ = post(server, question(), path, Authorization="Bearer open sesame")
      assert status == 200 and headers["Access-Control-Allow-Origin"] == "http://a.example"


def test_while_loading():
  with serving(ready=False) as server:
    status, headers, text = post(server, question())
    assert status == 503 and headers["Retry-After"] == "1" and json.loads(text)["error"]["message"] == "loading"
    for path, status in (("/health", 503), ("/v1/models", 503), ("/", 200), ("/shapes.png", 200)):
      assert raw(server, request(start=f"GET {path} HTTP/1.1", length="")) == status


def test_queue_is_full(server, monkeypatch):
  monkeypatch.setattr(serve, "WAITING", 2)
  with ThreadPoolExecutor(2) as pool:
    with together(server, 3):
      others = [pool.submit(ask, server)]
      with socket.create_connection(server.server_address) as client:
        client.sendall(request(GOOD))
        until(lambda: len(server.waiting.questions) == 2)
        status, headers, text = post(server, question())
        assert status == 429 and headers["Retry-After"] == "1" and json.loads(text)["error"]["type"] == "rate_limit_error"
      others.append(pool.submit(ask, server))  # in the place of who has left
    assert {content(other.result()) for other in others} == {content(ask(server))}

# ---- answers ----
def test_answer(server):
  reply = ask(server, max_tokens=50, model="toy", user="me", n=1, tools=None)
  right = toy().generate([PICTURES[0]], [DETECT])[0]
  assert content(reply) == right.text and reply["choices"][0]["finish_reason"] == "stop"
  assert [(box["label"], box["box"]) for box in reply["boxes"]] == [
    (box.label, [round(v, 1) for v in box.box]) for box in right.boxes]
  assert reply["usage"] == {"prompt_tokens": 64 + 8, "completion_tokens": 14, "total_tokens": 86}
  assert ask(server, max_completion_tokens=3)["choices"][0]["finish_reason"] == "length"
  models = json.loads(urllib.request.urlopen(server.address + "/v1/models").read())
  assert models["data"] == [{"id": "toy", "object": "model", "created": server.created, "owned_by": "vlm"}]


def test_pictures_of_all_kinds(server, tmp_path):
  image = Image.open(PICTURES[0])
  for kind, options in (("png", {}), ("jpeg", {"quality": 95}), ("webp", {"lossless": True}), ("gif", {})):
    image.save(path := tmp_path / f"a.{kind}", **options)
    url = data_url(path, f"image/{kind}")
    for same in (url, url.rstrip("="), url.replace(f"image/{kind}", "")):
      body = question("caption en", same)
      assert "yellow star" in content(json.loads(post(server, body)[2]))
  body["messages"][0]["content"][0]["image_url"] = url  # a bare string
  assert "yellow star" in content(json.loads(post(server, body)[2]))
  body["messages"][0]["content"][0]["image_url"] = {"url": url, "detail": "high"}
  body["messages"] = [{"role": "system", "content": "Be rude."}, {"role": "user", "content": "earlier"}, *body["messages"],
                      {"role": "assistant", "content": "well"}]
  assert "yellow star" in content(json.loads(post(server, body)[2]))


def test_mask(server):
  [box] = ask(server, "segment purple square", PICTURES[2])["boxes"]
  mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(box["mask"]))))
  right = toy().generate([PICTURES[2]], ["segment purple square"])[0].boxes[0]
  width, height = Image.open(PICTURES[2]).size
  assert (mask == vlm.beside("draw").Masks(toy().folder, toy().device)(right, width, height)).all() and mask.any()


def test_stream(server):
  status, headers, text = post(server, question(stream=True, stream_options={"include_usage": True}))
  assert status == 200 and headers["Content-Type"] == "text/event-stream" and text.endswith("\n\ndata: [DONE]\n\n")
  *chunks, last, usage = events(text)
  whole = ask(server)
  assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
  pieces = [chunk["choices"][0]["delta"]["content"] for chunk in chunks]
  assert "".join(pieces) == content(whole) and len(pieces) == 1 + whole["usage"]["completion_tokens"]
  assert last["choices"][0]["finish_reason"] == "stop" and last["boxes"] == whole["boxes"]
  assert usage["choices"] == [] and usage["usage"] == whole["usage"] and last["usage"] is None
  assert "usage" not in events(post(server, question(stream=True))[2])[-1]


def test_stop():
  """A text is only sent once it cannot become a stop any more, and an answer ends where one begins."""
  body = question(stop=["red star", "xyz"])
  def feed(*pieces):
    row, tokenizer = serve.Question(toy(), body, None, watched=True), SimpleNamespace(piece=lambda id: pieces[id].encode())
    model = SimpleNamespace(tokenizer=tokenizer, config=SimpleNamespace(eos=()))
    for id in range(len(pieces)):
      if row.live:
        row.take(id, model, None)
    row.close()
    return [event["token"] for event in row.events() if "token" in event], row.reason
  assert feed("a re", "d st", "op") == (["a ", "", "red stop"], None)
  assert feed("a re", "d st", "ar left", "of") == (["a ", "", ""], "stop")
  assert feed("xy", "xyz") == (["", "xy"], "stop")


def test_stop_of_a_real_answer(server):
  whole = content(ask(server, "caption en"))
  assert whole == "a green triangle, a red circle and a yellow star"
  for stop, right in ((" circle", "a green triangle, a red"), ([" and", "triangle"], "a green "), ("blue", whole)):
    reply = ask(server, "caption en", stop=stop)
    assert content(reply) == right and reply["choices"][0]["finish_reason"] == "stop"
    pieces = events(post(server, question("caption en", stop=stop, stream=True))[2])
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in pieces) == right


def test_the_page_s_stream(server):
  text = post(server, question("segment purple square", PICTURES[2]), "/ask")[2]
  told = events(text)
  right = toy().generate([PICTURES[2]], ["segment purple square"])[0]
  assert "".join(event["token"] for event in told if "token" in event) == right.text
  kinds = [next(key for key in ("token", "object", "end", "attention") if key in event) for event in told]
  assert kinds[:5] == ["token"] * 4 + ["object"] and kinds[-2:] == ["end", "attention"]  # a box with its fourth place
  with_mask = [event for event in told if "mask" in event]
  assert len(with_mask) == 1 and kinds[told.index(with_mask[0]):].count("token") == 2  # before its label
  assert [event["label"] for event in told if "object" in event][-1] == "purple square"
  inputs, [start] = show.sequences(toy(), [PICTURES[2]], ["segment purple square"], [right.tokens], serve.WATCHED)
  maps = np.mean([t.numpy()[0, start - 1:][:len(right.tokens)] for t in show.image_maps(toy().net.language_model, *inputs)], 0)
  seen = np.array([list(base64.b64decode(row)) for row in told[-1]["attention"]])
  assert np.abs(seen / 255 - maps / np.maximum(maps.max(1, keepdims=True), maps.max() / 4)).max() < 1.01 / 255

# ---- many at once ----
ROWS = [dict(prompt=prompt, picture=PICTURES[i % 5], max_tokens=(40, 7, 60)[i % 3], **more) for i, (prompt, more) in enumerate([
  ("caption en", {}), (DETECT, {}), ("caption en", {"temperature": 5, "seed": 3}), ("segment purple square", {}),
  ("answer en how many shapes are there?", {"temperature": 4, "top_p": .9, "seed": 4}), ("detect blue square", {}),
  ("caption en", {"temperature": 6, "top_k": 20, "seed": 5}), ("caption en", {"temperature": 5, "seed": 2 ** 63})])]


@functools.cache
def alone(i):
  """Cut by hand, because each max_tokens would be another program."""
  options = {key: value for key, value in ROWS[i].items() if key not in ("prompt", "picture", "max_tokens")}
  tokens = toy().generate([ROWS[i]["picture"]], [ROWS[i]["prompt"]], **options)[0].tokens[:ROWS[i]["max_tokens"]]
  return toy().answer(ROWS[i]["picture"], tokens)


@pytest.mark.parametrize("clients", [1, 2, 4, 8])
def test_rows_are_answered_as_alone(server, monkeypatch, clients):
  for i in range(clients):
    alone(i)
  with watch(monkeypatch) as sizes, ThreadPoolExecutor(clients) as pool:
    with together(server, clients):
      asked = [pool.submit(post, server, question(**ROWS[i]), "/ask") for i in range(clients)]
    for i, one in enumerate(asked):
      told = events(one.result()[2])
      assert [event["id"] for event in told if event.get("id") is not None] == alone(i).tokens, ROWS[i]
      assert told[-2 if "attention" in told[-1] else -1]["text"] == alone(i).text
  assert sizes == [1, clients]


def test_several_pictures(server, monkeypatch):
  """Asked by themselves, and not in a batch with one picture."""
  pair = [PICTURES[1], PICTURES[2]]
  prompt = "answer en what is different between the first picture and the second?"
  right = toy().generate([pair], [prompt])[0]
  with watch(monkeypatch) as sizes, ThreadPoolExecutor(2) as pool:
    with together(server, 2):
      one, two = pool.submit(ask, server), pool.submit(ask, server, prompt, pair)
    assert content(one.result()).endswith("yellow star") and content(two.result()) == right.text
  assert sizes == [1, 1, 1]


def test_a_batch_fits_into_the_context(server, monkeypatch):
  """A long prompt and a long answer do not together."""
  text = dataclasses.replace(toy().config.text, max_position_embeddings=512)
  monkeypatch.setattr(toy(), "config", dataclasses.replace(toy().config, text=text))
  long = "detect " + " ; ".join(["red circle"] * 80)
  with watch(monkeypatch) as sizes, ThreadPoolExecutor(2) as pool:
    with together(server, 2):
      both = [pool.submit(post, server, question(long, max_tokens=5)), pool.submit(post, server, question())]
    assert [one.result()[0] for one in both] == [200, 200] and sizes == [1, 1, 1]


def test_who_leaves_costs_nothing(server, endless):
  """Not one more step after the one in which it was seen."""
  with socket.create_connection(server.server_address) as client:
    client.sendall(request(json.dumps(question(max_tokens=400, stream=True)).encode()))
    until(lambda: len(endless) > 20)
  until(lambda: server.waiting.idle)
  steps = len(endless)
  assert steps < 300 and content(ask(server, max_tokens=2)) and len(endless) == steps + 1


def test_who_leaves_does_not_disturb(server, monkeypatch):
  alone(0)
  with ThreadPoolExecutor(4) as pool:
    for _ in range(3):
      with together(server, 4):
        asked = [pool.submit(post, server, question(**ROWS[0])) for _ in range(3)]
        with socket.create_connection(server.server_address) as client:
          client.sendall(request(json.dumps(question(stream=True)).encode()))
          client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # as of a process that is killed
          until(lambda: len(server.waiting.questions) == 4)
      assert {content(json.loads(one.result()[2])) for one in asked} == {alone(0).text}


def test_slow_reader(server, endless, monkeypatch):
  """Who does not read fills a buffer, and stops nobody else."""
  plain = serve.Server.get_request
  def get_request(self):
    client, address = plain(self)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return client, address
  monkeypatch.setattr(serve.Server, "get_request", get_request)
  with socket.socket() as client:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(server.server_address)
    client.sendall(request(json.dumps(question(max_tokens=400, stream=True)).encode()))
    until(lambda: len(endless) >= 399)  # its answer is whole, though nobody reads it
    assert ask(server, max_tokens=3)["usage"]["completion_tokens"] == 3
    got = b""
    while more := client.recv(65536):
      got += more
  assert got.endswith(b"data: [DONE]\n\n") and got.count(b"chat.completion.chunk") > 100


def test_failure_in_an_answer(server, endless, monkeypatch):
  plain = toy().decode
  def decode(token, slot, positions):
    if slot > 110:
      raise vlm.Fault("the device is gone", code=1)
    return plain(token, slot, positions)
  with monkeypatch.context() as patch:
    patch.setattr(toy(), "decode", decode)
    status, _, text = post(server, question(stream=True))
    assert status == 200 and events(text)[-1]["error"]["message"] == "the device is gone" and "[DONE]" not in text
    status, _, text = post(server, question())
    assert status == 500 and json.loads(text)["error"]["type"] == "server_error"
  assert ask(server, max_tokens=3)["usage"]["completion_tokens"] == 3


def test_unusual_programs_are_forgotten(server, monkeypatch):
  monkeypatch.setattr(serve, "RARE", 0)
  ask(server, max_tokens=500)
  assert content(ask(server)) == content(ask(server))
  until(lambda: set(toy().programs) <= warmed())
  assert all(C == 512 for _, C in toy().caches)


def storm(server, requests, clients):
  """-> requests/s; each answer is compared."""
  def one(i):
    assert content(ask(server, **ROWS[i % 8])) == alone(i % 8).text
  start = time.perf_counter()
  with ThreadPoolExecutor(clients) as pool:
    list(pool.map(one, range(requests)))
  return requests / (time.perf_counter() - start)


def test_many_requests(server):
  assert all(alone(i) for i in range(8))
  storm(server, 24, 8)

# ---- the program ----
def command(port):
  return [sys.executable, EXAMPLES / "serve.py", "--weights", ROOT / "weights" / "toy", "--port", str(port)]


def test_a_port_that_is_taken():
  with socket.create_server(("127.0.0.1", 0)) as other:
    program = subprocess.run(command(other.getsockname()[1]), capture_output=True, text=True)
  assert program.returncode == 1 and "choose another --port" in program.stderr and program.stderr.count("\n") == 1


@contextlib.contextmanager
def running(folder):
  """The program, ready -> its process and its address, as a server of this file has it"""
  with subprocess.Popen(command(0), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
    address = process.stdout.readline().strip()
    try:
      assert re.fullmatch(r"http://127\.0\.0\.1:\d+", address)
      port = int(address.rpartition(":")[2])
      yield SimpleNamespace(process=process, address=address, server_address=("127.0.0.1", port))
    except BaseException:
      process.kill()  # or its end would be waited for
      raise
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 130 and not stdout.strip() and "Traceback" not in stderr and re.search("warming|ready", stderr)


@pytest.mark.long
def test_program(tmp_path):
  with running(tmp_path) as server:
    assert json.loads(urllib.request.urlopen(f"{server.address}/health").read())["model"] == "toy"
    page = urllib.request.urlopen(server.address)
    assert page.read() == serve.PAGE.read_bytes() and "default-src 'none'" in page.headers["Content-Security-Policy"]
  assert not list(tmp_path.iterdir())


def memory(process):
  return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) / 1024  # MB


READER = """if True:  # says when its answer has begun
  import sys, urllib.request
  asked = urllib.request.Request(sys.argv[1], open(sys.argv[2], "rb").read(), {"Content-Type": "application/json"})
  with urllib.request.urlopen(asked) as answer:
    answer.readline()
    print(flush=True)
    answer.read()
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_five_hundred_requests(tmp_path, capsys):
  """None is lost, none mixed up; clients are killed, and a thousand more say nothing; memory stays flat. What is printed is
  how many a second, and asserted of nothing."""
  assert all(alone(i) for i in range(8))
  with running(tmp_path) as server:
    storm(server, 100, 8)
    before, rates = memory(server.process), []
    for clients in (1, 8, 1, 8):
      rates.append(storm(server, 125, clients))
    body, after = tmp_path / "body", [memory(server.process)]
    body.write_text(json.dumps(question(stream=True, temperature=100)))  # which hardly ever ends by itself
    for clients in (1, 8, 8):
      reader = [sys.executable, "-c", READER, server.address + "/v1/chat/completions", body]
      readers = [subprocess.Popen(reader, stdout=subprocess.PIPE) for _ in range(clients)]
      for one in readers:
        assert one.stdout.readline() == b"\n"
      for one in readers:
        one.kill()
        one.stdout.close()
      assert -signal.SIGKILL in [one.wait() for one in readers]  # some may have read all just before
      storm(server, 8, 8)
    after.append(memory(server.process))
    crowd = a_thousand(server)
    storm(server, 8, 8)
    for client in crowd:
      client.close()
    storm(server, 8, 8)
    after.append(memory(server.process))
  with capsys.disabled():
    print(f"\n{rates[0]:.1f} and {rates[2]:.1f} requests/s one at a time, {rates[1]:.1f} and {rates[3]:.1f} from 8 clients; "
          f"memory {before:.0f} MB, then {', '.join(f'{mb:.0f}' for mb in after)}")
  assert max(after) < before + 30


def test_the_page_needs_nothing_from_elsewhere():
  page = serve.PAGE.read_text()
  assert not re.findall(r"""(?:src|href|action|url)\s*[=(:]\s*["']?(?:https?:)?//""", page) and "http://" not in page
  assert "innerHTML" not in page and "eval(" not in page

# ---- live ----
def needed(name):
  return importlib.import_module(name) if os.environ.get("VLM_LIVE") else pytest.importorskip(name)


def test_live_openai(server):
  openai = needed("openai")
  client = openai.OpenAI(base_url=server.address + "/v1", api_key="none", max_retries=0)
  assert [model.id for model in client.models.list()] == ["toy"]
  reply = client.chat.completions.create(model="toy", **question())
  right = toy().generate([PICTURES[0]], [DETECT])[0]
  assert reply.choices[0].message.content == right.text and reply.usage.completion_tokens == 14
  assert reply.boxes[0]["label"] == "red circle"
  stream = client.chat.completions.create(model="toy", stream=True, stream_options={"include_usage": True}, **question())
  *chunks, usage = stream
  assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == right.text
  assert usage.usage == reply.usage and chunks[-1].choices[0].finish_reason == "stop" and chunks[-1].boxes == reply.boxes
  pair = [PICTURES[1], PICTURES[2]]
  reply = client.chat.completions.create(model="toy", temperature=1, seed=7, top_p=.9, stop=["xyz"], max_tokens=9,
                                         **question("answer en what changed?", pair))
  assert reply.choices[0].message.content == toy().generate([pair], ["answer en what changed?"], temperature=1, seed=7,
                                                            top_p=.9, max_tokens=9)[0].text
  with pytest.raises(openai.BadRequestError) as e:
    client.chat.completions.create(model="toy", messages=[{"role": "user", "content": "hello"}])
  assert e.value.param == "messages[0].content" and e.value.type == "invalid_request_error"
  with pytest.raises(openai.NotFoundError):
    client.chat.completions.create(model="gpt-4o", **question())


def test_live_openai_leaves(server, endless):
  openai = needed("openai")
  client = openai.OpenAI(base_url=server.address + "/v1", api_key="none", max_retries=0)
  with client.chat.completions.create(model="toy", stream=True, **question(max_tokens=400)) as stream:
    next(iter(stream))
  until(lambda: server.waiting.idle)
  assert len(endless) < 300
  with toy().turns, pytest.raises(openai.APITimeoutError):
    client.with_options(timeout=.3).chat.completions.create(model="toy", **question(max_tokens=400))
  steps = len(endless)
  assert client.chat.completions.create(model="toy", **question(max_tokens=2)).usage.completion_tokens == 2
  assert len(endless) == steps + 1


@contextlib.contextmanager
def browser(**options):
  """-> a page of chromium, whose console has to stay without errors."""
  playwright = needed("playwright.sync_api")
  program = shutil.which("chromium") or shutil.which("chromium-browser")
  if not program:
    pytest.skip("chromium is not installed")
  with playwright.sync_playwright() as p:
    chromium = p.chromium.launch(executable_path=program, args=["--no-sandbox"])
    page, wrong = chromium.new_page(**options), []
    page.set_default_timeout(30_000)
    page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
    page.on("pageerror", lambda e: wrong.append(str(e)))
    yield page
    chromium.close()
  assert not [text for text in wrong if "the server responded with a status of" not in text]


def shoot(page, name):
  if folder := os.environ.get("VLM_SHOTS"):
    Path(folder).mkdir(parents=True, exist_ok=True)
    page.screenshot(path=Path(folder) / f"{name}.png")


def drop(page, path):
  """A file of the desktop, dropped on the page."""
  page.evaluate("""async url => {
    const data = new DataTransfer(), blob = await (await fetch(url)).blob()
    data.items.add(new File([blob], "dropped.png", {type: "image/png"}))
    document.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}))
  }""", data_url(path))
  page.wait_for_selector("#picture[aria-label='dropped.png']")


def pixels(page, id):
  """What a canvas shows -> uint8 (H, W, 4)."""
  data = page.evaluate(f"document.getElementById('{id}').toDataURL()")
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))).convert("RGBA"))


def send(page, prompt):
  page.fill("#prompt", prompt)
  page.press("#prompt", "Enter")


def answered(page):
  page.wait_for_selector("#answer span")
  page.wait_for_selector("#stop", state="hidden")


def serious(page):
  """What axe-core finds that keeps people out; without it (npm installs it) the names of all that can be used."""
  axe = next(iter(Path(os.environ.get("VLM_AXE", "/nowhere")).glob("**/axe.min.js")), None)
  if axe:
    page.evaluate(axe.read_text())
    found = page.evaluate("axe.run()")["violations"]
    return [f"{v['id']}: {v['help']}, {v['nodes'][0]['html']}" for v in found if v["impact"] in ("serious", "critical")]
  return page.evaluate("""[...document.querySelectorAll("button, input, summary")].filter(e => e.checkVisibility() &&
    !(e.ariaLabel || e.textContent.trim() || e.labels?.[0]?.textContent.trim())).map(e => e.outerHTML)""")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_live_page(server, scheme, tmp_path):
  with browser(color_scheme=scheme, viewport={"width": 1180, "height": 720}, bypass_csp=True) as page:
    page.goto(server.address)
    page.wait_for_selector("#send:enabled")
    assert "knows only pictures like examples/shapes.png" in page.text_content("#model")
    shoot(page, f"{scheme}-first")
    drop(page, PICTURES[0])
    before = pixels(page, "picture")
    page.click("#tasks >> text=Detect")
    page.press("#prompt", "Enter")
    answered(page)
    assert page.text_content("#answer") == toy().generate([PICTURES[0]], [DETECT])[0].text
    changed = (pixels(page, "picture") != before).any(-1)
    for x1, y1, x2, y2 in [map(round, box["box"]) for box in ask(server)["boxes"]]:
      edges = changed[y1, x1:x2], changed[y2, x1:x2], changed[y1:y2, x1], changed[y1:y2, x2]
      assert min(edge.mean() for edge in edges) > .95 and changed[y1 + 9:y2 - 9, x1 + 9:x2 - 9].mean() < .2
    page.hover("#answer span >> text=circle")
    page.wait_for_function("getComputedStyle(document.getElementById('heat')).opacity == 1")
    heat = pixels(page, "heat")[..., 3].astype(int)
    assert heat.shape == (8, 8) and divmod(heat.argmin(), 8) in [(5, 4), (5, 5), (6, 4), (6, 5), (4, 4), (4, 5)]  # red circle
    shoot(page, f"{scheme}-token")
    page.hover("#objects button >> nth=1")
    assert "".join(page.locator("#answer .lit").all_text_contents()).endswith("<loc1007> yellow star")
    shoot(page, f"{scheme}-object")
    page.focus("#answer")
    page.press("#answer", "ArrowRight")
    page.press("#answer", "ArrowRight")
    assert page.locator("#answer .lit").count() == 1
    assert serious(page) == []
    drop(page, PICTURES[2])
    send(page, "segment purple square")
    answered(page)
    page.wait_for_selector("#objects >> text=purple square")
    shoot(page, f"{scheme}-mask")
    image, found = pixels(page, "picture"), ask(server, "segment purple square", PICTURES[2])["boxes"][0]
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["mask"]))))
    changed = (image[..., :3] != np.asarray(Image.open(PICTURES[2]).convert("RGB"))).any(-1)
    assert changed[mask].mean() > .99 and changed[~mask].mean() < .15
    for id in ("save-picture", "save-json"):
      with page.expect_download() as saved:
        page.click(f"#{id}")
      saved.value.save_as(tmp_path / saved.value.suggested_filename)
    assert json.loads((tmp_path / "dropped.json").read_text())["boxes"] == [found]
    assert Image.open(tmp_path / "dropped.boxes.png").size == Image.open(PICTURES[2]).size
    page.click("#earlier li:nth-child(2) button")
    assert page.input_value("#prompt") == DETECT and "yellow star" in page.text_content("#answer")
    page.evaluate("server => { fetch = () => Promise.reject(new TypeError()) }")
    send(page, "caption en")
    page.wait_for_selector("#error:visible")
    assert "does not answer" in page.text_content("#error") and page.input_value("#prompt") == "caption en"
    shoot(page, f"{scheme}-error")


def test_live_page_refused_stopped_and_narrow(server, endless):
  with browser(viewport={"width": 380, "height": 800}) as page:
    page.goto(server.address)
    page.wait_for_selector("#send:enabled")
    page.click("summary")
    page.fill("#max_tokens", "400")
    page.fill("#top_p", "1")
    send(page, "caption en")
    page.wait_for_selector("#answer span:nth-child(3)")
    page.click("#stop")
    page.wait_for_selector("#stop", state="hidden")
    assert page.text_content("#speed") == "stopped" and page.is_visible("#send")
    until(lambda: server.waiting.idle)
    assert len(endless) < 390
    page.fill("#max_tokens", "3")
    send(page, "caption en " * 600)
    page.wait_for_selector("#error:visible")
    assert "do not fit" in page.text_content("#error") and page.input_value("#prompt").startswith("caption en")
    assert page.evaluate("document.documentElement.scrollWidth") == 380
    shoot(page, "narrow")
    assert page.locator("#earlier li").count() == 1
