"""What the model looks at.

    python examples/show.py attention IMAGE ... PROMPT [--layer N] [--out FILE]
        for each token of the answer, the picture lit where its attention over the image tokens went
    python examples/show.py patches IMAGE ... [PROMPT] [--layer N] [--out FILE]
        on each image token the word of the vocabulary that is nearest to what a layer takes from it
    python examples/show.py eval [--scenes 200]
        does that mean anything, on the toy's scenes?
"""
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
import vlm  # first, because it says what is not installed
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tinygrad import Tensor
import shapes
from batch import answer_all, batches, filled, pictures_of
from vlm import Fault

ROOT = Path(__file__).resolve().parents[1]
ROUND = 16            # texts are padded to a multiple of this: answers of different lengths share programs
PANEL, STRIP, GRID = 400, 1240, 1024  # pixels: longer side of a token's picture, width of all, of all patches
HEAT = [(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)]  # "inferno": ever lighter
WEAK = .75  # of the largest cosine: words that are farther off are not shown


# ---- 1. Attention ----


def attention_weights(q, k, scale, mask=None, softcap=0.0):
  """What attention() of vlm.py, called with these and v, weighs v with -> (B, H, T, C); C of them add up to
  1."""
  B, H, T, d = q.shape
  K, C = k.shape[1:3]
  logits = vlm.matmul(q.reshape(B, K, H // K * T, d), k)
  if softcap:
    logits, scale = vlm.soft_cap(logits, softcap, scale), 1.0
  if mask is not None:
    logits = mask.expand(B, 1, H // K, T, C).reshape(B, 1, H // K * T, C).where(logits, -np.inf)
  return vlm.softmax(logits, scale).reshape(B, H, T, C)


def sequences(model, images, prompts, answers, multiple=ROUND):
  """B rows of [image][prompt][answer][padding up to a multiple]. images and prompts: as VLM.generate takes
  them; answers: lists of tokens -> what `watched` takes, on the device: image (B, P, D), ids (B, T), two
  masks, cos and sin; and the lengths of the prompts. Raises Fault."""
  c, rows = model.config, [pictures_of(image) for image in images]
  prompts = [model.tokenizer.prompt(prompt) for prompt in prompts]
  P = c.vision.patches * len(rows[0])
  longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers))
  if P + longest > c.text.max_position_embeddings:
    raise Fault(f"{P + longest} tokens of pictures and text do not fit into the context of "
                f"{c.text.max_position_embeddings}; shorten the prompt")
  # As it was answered: the prefix sees itself, an answer's token what came before, as far as a window goes.
  T = -(-longest // multiple) * multiple
  ids, _, *rest = vlm.collate(c.text, P, list(zip(prompts, answers)), T)
  image = np.concatenate([model.vision(image)[1] for row in rows for image in row]).reshape(len(rows), P, -1)
  vlm.log.debug("watching the attention")
  return [vlm.upload(t, model.device) for t in (image, ids, *rest)], [len(prompt) for prompt in prompts]


def watched(gemma, watch, image, ids, full, sliding, cos, sin):
  """One pass: watch(q, k, v, scale, mask, softcap) sees what each layer of Gemma gives to attention() -> what
  comes out of the last layer (B, P + T, D), not yet computed."""
  plain = vlm.attention
  def attention(*args):
    watch(*args)
    return plain(*args)
  vlm.attention = attention
  try:
    return gemma(image.cat(gemma.embed(ids), dim=1), cos, sin, (full, sliding))
  finally:
    vlm.attention = plain


def watched_pass(model, images, prompts, answers, watch):
  """That pass over the rows of `sequences`, outside any compiled program -> its output and the lengths of the
  prompts. Raises Fault."""
  inputs, lengths = sequences(model, images, prompts, answers)
  return watched(model.net.language_model, watch, *inputs), lengths


def image_maps(gemma, image, *inputs):
  """What `sequences` gives -> for each layer (B, T, P): the attention of each token of the text over the
  image tokens, mean of all heads, not yet computed."""
  P, maps = image.shape[1], []
  def watch(q, k, v, scale, mask, softcap):
    # Only the text asks. The mask is not contiguous: in a compiled program a part of an input would be that
    # of the first call, for ever.
    weights = attention_weights(q[:, :, P:].contiguous(), k, scale, mask[:, :, :, P:], softcap)
    maps.append(weights[..., :P].mean(1).contiguous())
  watched(gemma, watch, image, *inputs)
  return maps


def attention_maps(model, images, prompts, answers):
  """images and prompts as VLM.generate takes them, answers: lists of tokens -> for each row float32 (layers,
  N, P): how much of the attention, mean of all heads, that chose each of N tokens went to each of P image
  tokens. What is missing to 1 went to the text. A token is chosen at the place before it."""
  inputs, lengths = sequences(model, images, prompts, answers)
  maps = image_maps(model.net.language_model, *inputs)
  Tensor.realize(*maps)
  maps = np.stack([t.numpy() for t in maps])
  return [maps[:, i, n - 1:n - 1 + len(answer)] for i, (n, answer) in enumerate(zip(lengths, answers))]


# ---- 2. The nearest word ----


def words(tokenizer):
  """-> {id: text} of what can be read as a word: letters or digits only, after a space or not. No <loc>,
  <seg>, control or byte token, no punctuation."""
  base = tokenizer.model
  texts = {id: tokenizer.piece(id).decode(errors="replace").strip() for id in range(base.get_piece_size())
           if not base.is_byte(id)}
  return {id: text for id, text in texts.items() if text.isalnum()}


def nearest(model, features, block=4096):
  """features (N, D) -> for each the word whose row of the embedding matrix has the largest cosine with it,
  and those cosines (N,)."""
  known = words(model.tokenizer)
  ids, texts = np.array(list(known), np.int32), list(known.values())
  features = features / np.linalg.norm(features, axis=-1, keepdims=True).clip(1e-30)
  best, index = np.full(len(features), -np.inf), np.zeros(len(features), int)
  for i in range(0, len(ids), block):  # the whole matrix as float32 would be 2 GB
    wanted = np.resize(ids[i:i + block], (1, min(block, len(ids))))  # the last one filled up with repetitions
    rows = model.net.language_model.embed_tokens(vlm.upload(wanted, model.device)).numpy()[0]
    cosine = features @ (rows / np.linalg.norm(rows, axis=-1, keepdims=True).clip(1e-30)).T
    better = cosine.max(1) > best
    best = np.where(better, cosine.max(1), best)
    index = np.where(better, i + cosine.argmax(1) % len(ids[i:i + block]), index)
  return [texts[i] for i in index], best


def contributions(model, images, prompts):
  """images and prompts as VLM.generate takes them -> for each layer float32 (B, P, D): what a token that
  looked only at this image token would get from that layer's attention."""
  c, out = model.config.text, []
  P, H, d = model.config.vision.patches * len(pictures_of(images[0])), c.num_attention_heads, c.head_dim
  def watch(q, k, v, *rest):
    layer, (B, K) = model.net.language_model.layers[len(out)], v.shape[:2]
    v = v[:, :, :P].reshape(B, K, 1, P, d).expand(B, K, H // K, P, d).reshape(B, H, P, d)
    x = layer.self_attn.o_proj(v.transpose(1, 2).reshape(B, P, H * d).contiguous())
    out.append((layer.post_attention_layernorm(x) if c.gemma2 else x).contiguous())
  watched_pass(model, images, prompts, [[]] * len(prompts), watch)
  Tensor.realize(*out)
  return [t.numpy() for t in out]


# ---- 3. Pictures ----


def label(tokenizer, id):
  """A token's text as one line in signs that the font has."""
  piece = tokenizer.piece(id)
  try:
    text = piece.decode()
  except UnicodeDecodeError:  # a byte of a longer character
    text = f"<0x{piece.hex().upper()}>"
  return plain(text.strip() or (repr(text) if text else f"<{id}>"))


def plain(text):
  return text.encode("latin-1", "backslashreplace").decode("latin-1")


def shorten(draw, text, width, size):
  """-> text, cut if need be, and its font, of this size or less, so that it is at most so wide."""
  for size in range(size, 8, -1):
    font = ImageFont.load_default(size=size)
    if draw.textlength(text, font=font) <= width:
      return text, font
  while text[1:] and draw.textlength(text, font=font) > width:
    text = text[:-1]
  return text, font


def heat_colors(heat):
  """(..) from 0 to 1 -> (.., 3), darker to lighter."""
  return np.stack([np.interp(heat, np.linspace(0, 1, len(HEAT)), channel) for channel in zip(*HEAT)], -1)


def light(image, heat):
  """The picture, pale and dark, with heat (G, G) on it in colours. A frame around the largest."""
  g = len(heat)
  spread = Image.fromarray(heat.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
  spread = np.asarray(spread).clip(0, 1)[..., None]  # (H, W, 1)
  pale = .25 * np.asarray(image, np.float32) + .25 * np.asarray(image.convert("L"), np.float32)[..., None]
  share = .85 * spread ** .7  # what is half as much is still to be seen
  image = Image.fromarray((pale * (1 - share) + heat_colors(spread[..., 0]) * share).astype(np.uint8))
  y, x = divmod(int(heat.argmax()), g)
  w, h = image.width / g, image.height / g
  frame = x * w, y * h, (x + 1) * w - 1, (y + 1) * h - 1
  ImageDraw.Draw(image).rectangle(frame, outline="white", width=2)
  return image


EDGES = "top, y = ", "left, x = ", "bottom, y = ", "right, x = "


def read_edges(labels, size):
  """Labels of an answer's tokens and the picture's size -> captions, in which the four <loc> of a box are its
  edges in pixels, and for each token what it stands for, as a box in shares of the picture's sides: an edge,
  or in what follows the four the box; None where it is neither."""
  captions, marks, edges = [], [], []
  for text in labels:
    mark, loc = None, re.fullmatch(r"<loc(\d{4})>", text)
    if text == ";" or loc and len(edges) == 4:
      edges = []
    if loc:
      value, along = int(loc[1]) / 1023, len(edges) % 2  # y before x
      text = f"{EDGES[len(edges)]}{value * size[1 - along]:.0f}"
      mark = (value, 0, value, 1) if along else (0, value, 1, value)
      edges.append(value)
    elif len(edges) == 4:
      mark = edges[1], edges[0], edges[3], edges[2]
    captions.append(text)
    marks.append(mark)
  return captions, marks


def outline(image, mark):
  """Draws a box that is given in shares of the picture's sides."""
  x1, x2, y1, y2 = *sorted(mark[::2]), *sorted(mark[1::2])
  w, h, draw = image.width - 1, image.height - 1, ImageDraw.Draw(image)
  draw.rectangle((x1 * w - 1, y1 * h - 1, x2 * w + 1, y2 * h + 1), outline="black", width=3)
  draw.rectangle((x1 * w, y1 * h, x2 * w, y2 * h), outline="#56b4e9")


def titled(image, *lines):
  """The picture under lines of text, the first of them larger."""
  pen, fonts = ImageDraw.Draw(image), [ImageFont.load_default(size=20), ImageFont.load_default(size=15)]
  fitted = []
  for i, line in enumerate(map(plain, lines)):
    words, row = line.split(" "), ""
    for word in words:  # in as many rows as it takes
      if row and pen.textlength(f"{row} {word}", font=fonts[i > 0]) > image.width - 16:
        fitted.append((row, fonts[i > 0]))
        row = word
      else:
        row = f"{row} {word}".strip()
    fitted.append((row, fonts[i > 0]))
  top = sum(font.size + 8 for _, font in fitted) + 8
  sheet = Image.new("RGB", (image.width, image.height + round(top)), "white")
  sheet.paste(image, (0, round(top)))
  pen, y = ImageDraw.Draw(sheet), 8
  for row, font in fitted:
    pen.text((8, y), row, fill="black", font=font)
    y += font.size + 8
  return sheet


def strip(pictures, maps, labels):
  """PIL images of one question, maps (N, P of them all) and N labels -> one picture: a cell for each token,
  as many rows as it takes. Under a cell: the token, and how much of its attention went to the pictures at
  all. What the <loc> tokens of a box say is drawn on the first picture."""
  side, gap, below = round((maps.shape[1] / len(pictures)) ** .5), 10, 34
  labels, marks = read_edges(labels, pictures[0].size)
  small = [image.resize([max(1, round(s * PANEL / max(image.size))) for s in image.size],
                        Image.Resampling.LANCZOS) for image in pictures]
  width, height = sum(image.width for image in small), max(image.height for image in small)
  columns = max(1, min(len(labels), STRIP // (width + gap)))
  size = columns * (width + gap) + gap, -(-len(labels) // columns) * (height + below + gap) + gap
  sheet = Image.new("RGB", size, "white")
  pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
  for i, (weights, text, mark) in enumerate(zip(maps, labels, marks)):  # of one token: (P,)
    x, y = gap + i % columns * (width + gap), gap + i // columns * (height + below + gap)
    text, large = shorten(pen, text, width - 60, 22)
    pen.text((x + 2, y + height + below / 2), text, fill="black", font=large, anchor="lm")
    percent = f"{100 * weights.sum():.0f} %"
    pen.text((x + width, y + height + below / 2), percent, fill="#666666", font=font, anchor="rm")
    # Each to its own largest, or what is spread wide would not be seen; what is next to nothing stays dark.
    heats = weights / max(weights.max(), maps.max() / 4, 1e-30)
    for image, heat in zip(small, heats.reshape(len(small), side, side)):
      panel = light(image, heat)
      if mark and image is small[0]:
        outline(panel, mark)
      sheet.paste(panel, (x, y))
      x += image.width
  return sheet


def grid(image, texts, near):
  """PIL image and, for each image token, row by row, a text and its cosine -> a larger picture with them on
  it, the farther the fainter, and none that is WEAK."""
  side = round(len(texts) ** .5)
  w = max(64, GRID // side)
  h = max(18, round(w * image.height / image.width))
  image = image.resize((w * side, h * side), Image.Resampling.LANCZOS)
  lines = Image.new("RGBA", image.size)
  pen, most = ImageDraw.Draw(lines), max(near.max(), 1e-30)
  for i, text in enumerate(texts):
    x, y, share = i % side * w, i // side * h, near[i] / most
    pen.rectangle((x, y, x + w, y + h), outline="#80808080")
    if share >= WEAK:
      alpha = round(255 * (.4 + .6 * (share - WEAK) / (1 - WEAK)))
      text, font = shorten(pen, plain(text), w - 6, min(h - 4, max(14, w // 5)))
      pen.text((x + w / 2, y + h / 2), text, (255, 255, 255, alpha), font, "mm", stroke_width=max(1, w // 64),
               stroke_fill=(0, 0, 0, alpha))
  image.paste(lines, mask=lines)
  return image


def side_by_side(images):
  sheet = Image.new("RGB", (sum(i.width for i in images), max(i.height for i in images)), "white")
  for i, image in enumerate(images):
    sheet.paste(image, (sum(before.width for before in images[:i]), 0))
  return sheet


# ---- 4. Does it mean anything ----


def patches_in(box, size, side):
  """Box in pixels of a picture -> of each patch the share inside, and whether its centre does."""
  shares, centers = [], []
  for low, high in ((box[1] / size[1], box[3] / size[1]), (box[0] / size[0], box[2] / size[0])):  # y, then x
    edge = np.arange(side + 1) / side
    shares.append((np.minimum(edge[1:], high) - np.maximum(edge[:-1], low)).clip(0) * side)
    centers.append((low <= edge[:-1] + .5 / side) & (edge[:-1] + .5 / side < high))
  return np.outer(*shares).ravel(), np.outer(*centers).ravel()


def color_words(model, task, scene, prefix, answer):
  """-> (place in the answer, the Object that is meant) for each true colour word; how many are untrue."""
  texts = [model.tokenizer.piece(id).decode(errors="replace").strip() for id in answer.tokens]
  found, wrong = [], 0
  for i, text in enumerate(texts):
    if text in shapes.COLORS:
      shape = prefix.rstrip("?").split()[-1] if task == "color" else (texts + [""])[i + 1]
      named = [obj for obj in scene.objects if obj.name == f"{text} {shape}"]
      found += [(i, obj) for obj in named]
      wrong += not named
  return found, wrong


def evaluate(model, count):
  """Print how often the attention of a colour word and the nearest words are about the shape that they should
  be about, on held-out scenes -> {task: of all layers and of each, (layers + 1, 2)}."""
  scenes = [shapes.scene(shapes.TEST_SEED, i) for i in range(count)]
  side = round(model.config.vision.patches ** .5)
  results, chance, others, wrong = attention_of_colors(model, scenes, side)
  vlm.log.debug("")
  if not all(results.values()):
    raise Fault("the answers name no colour that is there: eval is for weights that know the toy world",
                code=1)
  means = {task: np.mean(values, 0) for task, values in results.items()}  # (layers + 1, 2)
  def line(title, cells):  # two cells for each of two tasks
    cells = [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells]
    print(f"{title:20}" + "".join(f"{cell:>14}" for cell in cells))
  print(f"{count} held-out scenes. Where the attention of a colour word falls, as a mean of all heads:\n")
  line("", ["caption en", "", "what color", "is ...?"])
  line("", ["maximum", "mass"] * 2)
  for i in range(model.config.text.num_hidden_layers + 1):
    line(f"layer {i}" if i else "all layers", [float(v) for task in means for v in means[task][i]])
  line("the box's area", [float(np.mean(chance[task])) for task in means for _ in range(2)])
  line("on another shape", [v for task in means for v in (float(np.mean(others[task])), "")])
  line("words", [v for task in means for v in (len(results[task]), "")])
  line("untrue, left out", [v for task in means for v in (wrong[task], "")])
  patches = patches_of_shapes(model, scenes, side)
  vlm.log.debug("")
  known = len(words(model.tokenizer))
  print(f"\nThe nearest of {known} words, of {len(patches[0])} patches within one shape:\n")
  line("", ["its colour", "its shape"])
  for i, result in enumerate(patches):
    line(f"layer {i} takes" if i else "projected", np.mean(result, 0).tolist())
  return means | {"patches": np.mean(patches, 1)}


def attention_of_colors(model, scenes, side):
  """-> {task: for each colour word of the answers (layers + 1, 2): whether the largest attention lies in the
  box of the shape that it names, and which share of all attention to the picture does}, first of all layers,
  then of each; {task: areas of the boxes}; {task: whether the largest of all layers lies in another's box
  instead}; {task: untrue words}."""
  asked, tasks = [], ("caption", "color")
  results, chance, others = ({task: [] for task in tasks} for _ in range(3))
  wrong = dict.fromkeys(tasks, 0)
  for i, scene in enumerate(scenes):
    rng, pools = np.random.default_rng((shapes.TEST_SEED, i, 2)), shapes.questions(scene)
    asked += [(task, scene, *pools[task][rng.integers(len(pools[task]))]) for task in tasks if pools[task]]
  asked.sort(key=lambda question: question[0])
  answered, done = [], 0
  for answer in answer_all(model, [(scene.image, prefix) for _, scene, prefix, _ in asked], shapes.BATCH,
                           max_tokens=shapes.MAX_TOKENS):
    answered.append(answer)
    vlm.terminal.bar(len(answered), len(asked), "questions answered")
  rows = [([scene.image], prefix, answer, task, scene)
          for (task, scene, prefix, _), answer in zip(asked, answered)]
  for batch in batches(rows, shapes.BATCH):
    images, prompts, answers, *_ = zip(*filled(batch, shapes.BATCH))
    maps = attention_maps(model, images, prompts, [answer.tokens for answer in answers])
    for (_, prefix, answer, task, scene), layers in zip(batch, maps):
      found, untrue = color_words(model, task, scene, prefix, answer)
      wrong[task] += untrue
      for i, obj in found:
        heat = np.concatenate([layers[:, i].mean(0, keepdims=True), layers[:, i]])  # (layers + 1, P)
        shares, centers = patches_in(obj.box, scene.image.size, side)
        results[task].append(np.stack([centers[heat.argmax(1)], heat @ shares / heat.sum(1)], 1))
        chance[task].append(shares.mean())
        hot = heat[0].argmax()
        rest = [patches_in(other.box, scene.image.size, side)[1] for other in scene.objects if other != obj]
        others[task].append(not centers[hot] and any(other[hot] for other in rest))
    done += len(batch)
    vlm.terminal.bar(done, len(rows), "answers watched")
  return results, chance, others, wrong


def patches_of_shapes(model, scenes, side):
  """-> for the projected features and what each layer takes, a list of (nearest word is its colour, is its
  name) for each patch of which at least 80 % lie within one shape, and nothing within another."""
  results, done = [[] for _ in range(model.config.text.num_hidden_layers + 1)], 0
  for batch in batches([([scene.image], "caption en", scene) for scene in scenes], shapes.BATCH):
    images, prompts, _ = zip(*filled(batch, shapes.BATCH))
    projected = np.stack([model.vision(image)[1] for [image] in images])  # (B, P, D)
    for result, features in zip(results, [projected, *contributions(model, images, prompts)]):
      texts = np.array(nearest(model, features.reshape(-1, features.shape[-1]))[0]).reshape(len(images), -1)
      for (_, _, scene), labels in zip(batch, texts):
        covers = np.stack([np.asarray(obj.coverage.resize((side, side), Image.Resampling.BOX)).ravel() / 255
                           for obj in scene.objects])  # (objects, P)
        for obj, cover in zip(scene.objects, covers):
          within = (cover >= .8) & (covers.sum(0) == cover)
          result += [(text == obj.color, text == obj.shape) for text in labels[within]]
    done += len(batch)
    vlm.terminal.bar(done, len(scenes), "scenes read")
  return results


# ---- 5. Command line ----


def draw_attention(model, args, pictures, prompt):
  """-> the answer's text and the picture, None of an empty answer."""
  [answer] = model.generate([pictures], [prompt], **vlm.sampling(args))
  if not answer.tokens:
    return answer.text, None
  [maps] = attention_maps(model, [pictures], [prompt], [answer.tokens])
  which = f"layer {args.layer}" if args.layer else "mean of all layers"
  maps = maps[args.layer - 1] if args.layer else maps.mean(0)
  sheet = strip(pictures, maps, [label(model.tokenizer, id) for id in answer.tokens])
  return answer.text, titled(sheet, f'"{prompt}": what each token of the answer looked at',
                             f"{which}; the lighter, the more, and a frame around the most; "
                             "% of its attention went to the picture, the rest to the text")


def draw_patches(model, args, pictures, prompt):
  """-> the picture, and the layer, by default the one whose words are nearest on the whole."""
  if args.layer == 0:
    layers = {0: np.concatenate([model.vision(picture)[1] for picture in pictures])}  # (P, D)
  else:
    taken = contributions(model, [pictures], [prompt])  # of each layer (1, P, D)
    layers = {i: features[0] for i, features in enumerate(taken, 1) if args.layer in (None, i)}
  vlm.log.debug("looking for the nearest words")
  words = {layer: nearest(model, features) for layer, features in layers.items()}
  layer = max(words, key=lambda layer: words[layer][1].mean())
  (texts, near), each = words[layer], model.config.vision.patches
  sheet = side_by_side([grid(picture, texts[i * each:(i + 1) * each], near[i * each:(i + 1) * each])
                        for i, picture in enumerate(pictures)])
  what = f'what layer {layer} takes from it, asked "{prompt}"' if layer else "it, projected"
  weak = f"the fainter, the farther; none where it is less than {100 * WEAK:.0f} % as near as the nearest"
  return titled(sheet, f"on each image token the word nearest to {what}", weak), layer


def split_words(args):
  """The words of a command line -> names of pictures, and the prompt. Raises Fault."""
  *names, prompt = args.words
  if args.what == "patches" and (not names or os.path.isfile(prompt)):
    return args.words, "caption en"
  if not names or os.path.isfile(prompt):
    raise Fault(f"what is asked? give a prompt after {prompt}")
  return names, prompt


COMMANDS = {  # its words, what it does
  "attention": ("IMAGE ... PROMPT", "the picture for each token of the answer, lit where its attention went"),
  "patches": ("IMAGE ... [PROMPT]", "on each image token the word whose embedding is nearest to what a "
              "layer's attention takes from that token once the prompt (caption en) is read")}
LAYER = {"attention": "of that layer alone, 1 the first (default: the mean of all)",
         "patches": "of that layer, 1 the first, 0 what goes into it (default: whose words are nearest)"}
EVAL = "measures both on held-out scenes of examples/shapes.py, with weights/toy unless told otherwise"


def add_commands(p):
  commands = p.add_subparsers(dest="what", metavar="attention|patches|eval", required=True)
  for what, (words, does) in COMMANDS.items():
    command = commands.add_parser(what, usage=f"show.py {what} {words} [options]", description=does,
                                  help=does, allow_abbrev=False)
    command.add_argument("words", nargs="+", metavar="IMAGE ... PROMPT", help="pictures, then the prompt")
    command.add_argument("--layer", type=int, metavar="N", help=LAYER[what])
    command.add_argument("--out", metavar="FILE", help=f"what to write (default: IMAGE.{what}.png here)")
    vlm.add_arguments(command, answers=what == "attention")
  command = commands.add_parser("eval", description=EVAL, help=EVAL, allow_abbrev=False)
  command.add_argument("--scenes", type=int, default=200, metavar="N", help="how many (default %(default)s)")
  vlm.add_arguments(command, answers=False)
  command.set_defaults(weights=str(ROOT / "weights" / "toy"))


@vlm.program
def main(argv):
  p = vlm.terminal.ArgumentParser(prog="show.py", description="What the model looks at.", allow_abbrev=False)
  add_commands(p)
  args = p.parse_args(argv)
  if args.what == "eval":
    if args.scenes < 1:
      raise Fault("--scenes: at least 1")
    evaluate(vlm.open_model(args), args.scenes)
    return
  if args.layer is not None and args.layer < (args.what == "attention"):
    raise Fault(f"--layer {args.layer}: the first layer is 1")
  names, prompt = split_words(args)
  args.out = f"{Path(names[0]).stem}.{args.what}.png" if args.out is None else args.out
  vlm.terminal.check(args, names, prompt)  # all that can be wrong, before the slow part
  prompt = vlm.terminal.asked(prompt)
  if args.what == "attention":
    vlm.sampling(args)
  pictures, model = [vlm.open_image(name) for name in names], vlm.open_model(args)
  if args.layer and args.layer > model.config.text.num_hidden_layers:
    raise Fault(f"--layer {args.layer}: this model has {model.config.text.num_hidden_layers}")
  if args.what == "attention":
    text, picture = draw_attention(model, args, pictures, prompt)
    vlm.log.debug("")
    print(text, flush=True)
  else:
    picture, layer = draw_patches(model, args, pictures, prompt)
    vlm.log.info(f"layer {layer}" if layer else "the projected image tokens")
  if picture is None:
    vlm.log.info(f"the answer is empty: {args.out} not written")
    return
  vlm.beside("draw").save_picture(picture, args.out, names)
  vlm.log.info(f"{args.what} drawn: {args.out}")


if __name__ == "__main__":
  sys.exit(main())
