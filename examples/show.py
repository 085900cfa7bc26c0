"""What the model looks at: `python vlm.py IMAGE PROMPT --show attention|patches [--layer N] [--out FILE]`.

attention: for each token of the answer, the picture lit where its attention over the image tokens went. patches: the
word of the vocabulary that is nearest to each image token.

    python examples/show.py --eval [--weights DIR] [--scenes 200]     does that mean anything, on the toy's scenes?
"""
import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tinygrad import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import vlm
import batch
import draw
import shapes
import train
from vlm import Fault

ROUND = 16            # texts are padded to a multiple of this: answers of different lengths share programs
NIGHT = (12, 16, 52)  # where nothing looks the picture fades to this blue: black would be like a dark photograph
SMALL, STRIP, CELL = 160, 1010, 64  # pixels: longer side of a token's picture, width of the strip, width of a patch


# ---- 1. Attention ----


def weights(q, k, scale, mask=None, softcap=0.0):
  """What attention() of vlm.py, called with these and v, weighs v with -> (B, H, T, C); C of them add up to 1."""
  B, H, T, d = q.shape
  K, C = k.shape[1:3]
  logits = vlm.matmul(q.reshape(B, K, H // K * T, d), k, batched=True)
  if softcap:
    logits, scale = vlm.soft_cap(logits, softcap, scale), 1.0
  if mask is not None:
    logits = mask.expand(B, 1, H // K, T, C).reshape(B, 1, H // K * T, C).where(logits, -np.inf)
  above, total = vlm.softmax(logits, scale)
  return (above / total).reshape(B, H, T, C)


def listed(images):
  """images as VLM.generate takes them, a picture or a list of pictures for each row -> a list of pictures for each."""
  return [image if isinstance(image, (list, tuple)) else [image] for image in images]


def forward(model, images, prompts, answers, watch):
  """One pass over B rows of [image][prompt][answer][padding], outside any compiled program: watch(q, k, v, scale, mask,
  softcap) sees what each layer of Gemma gives to attention(). images: as VLM.generate takes them; answers: lists of
  tokens -> what comes out of the last layer (B, P + T, D), not yet computed, and the lengths of the prompts."""
  c, gemma = model.config, model.net.language_model
  rows, prompts = listed(images), [model.tokenizer.prompt(prompt) for prompt in prompts]
  P = c.patches * len(rows[0])
  start = [P + len(p) for p in prompts]
  end = [n + len(a) for n, a in zip(start, answers)]
  n = P + -(-(max(end) - P) // ROUND) * ROUND
  ids = np.array([p + a + [0] * (n - e) for p, a, e in zip(prompts, answers, end)], np.int32)
  # As it was answered: prefix tokens all see each other, an answer's token what came before, as far as a window goes.
  masks = [train.training_mask(start, end, n, window)[:, :, None] for window in (None, c.window)]
  ids, *masks, cos, sin = (vlm.upload(t, model.device) for t in (ids, *masks, *vlm.rope_table(c, np.arange(n))))
  image = Tensor.cat(*[model.image_features(image) for row in rows for image in row]).reshape(len(rows), P, -1)
  plain = vlm.attention
  def watched(*args):
    watch(*args)
    vlm.attention = plain  # it calls itself, for many queries
    out = plain(*args)
    vlm.attention = watched
    return out
  vlm.attention = watched
  try:
    x = gemma(image.cat(gemma.embed(ids), dim=1).contiguous(), cos, sin, masks, [lambda k, v: (k, v)] * c.layers)
  finally:
    vlm.attention = plain
  return x, [len(p) for p in prompts]


def attention(model, images, prompts, answers):
  """images and prompts as VLM.generate takes them, answers: lists of tokens -> for each row float32 (layers, N, P): how
  much of the attention, mean of all heads, that chose each of N tokens went to each of P image tokens. What is missing
  to 1 went to the text. A token is chosen at the place before it."""
  P, maps = model.config.patches * len(listed(images)[0]), []
  def watch(q, k, v, scale, mask, softcap):
    q, mask = q[:, :, P:].contiguous(), mask[:, :, :, P:].contiguous()  # only the text asks
    maps.append(weights(q, k, scale, mask, softcap)[..., :P].mean(1).contiguous())  # (B, T, P)
  x, lengths = forward(model, images, prompts, answers, watch)
  Tensor.realize(*maps)
  maps = np.stack([t.numpy() for t in maps])
  return [maps[:, i, n - 1:n - 1 + len(answer)] for i, (n, answer) in enumerate(zip(lengths, answers))]


# ---- 2. The nearest word ----


def words(tokenizer):
  """-> {id: text} of what can be read as a word: letters or digits only, after a space or not. No <loc>, <seg>, control
  or byte token, no punctuation."""
  texts = {id: tokenizer.piece(id).decode(errors="replace").strip() for id in range(tokenizer.model.get_piece_size())
           if not tokenizer.model.is_byte(id)}
  return {id: text for id, text in texts.items() if text.isalnum()}


def nearest(model, features, block=4096):
  """features (N, D) -> for each the word whose row of the embedding matrix has the largest cosine with it, and those
  cosines (N,)."""
  known = words(model.tokenizer)
  ids, texts = np.array(list(known), np.int32), list(known.values())
  features = features / np.linalg.norm(features, axis=-1, keepdims=True).clip(1e-30)
  best, where = np.full(len(features), -np.inf), np.zeros(len(features), int)
  for i in range(0, len(ids), block):  # the whole matrix as float32 would be 2 GB
    some = np.resize(ids[i:i + block], (1, min(block, len(ids))))  # the last block is filled up with repetitions
    rows = model.net.language_model.embed_tokens(vlm.upload(some, model.device)).numpy()[0]
    cosine = features @ (rows / np.linalg.norm(rows, axis=-1, keepdims=True).clip(1e-30)).T
    found = cosine.argmax(1)
    better = cosine.max(1) > best
    best = np.where(better, cosine.max(1), best)
    where = np.where(better, i + found % len(ids[i:i + block]), where)
  return [texts[i] for i in where], best


def taken(model, images, prompts):
  """images and prompts as VLM.generate takes them -> for each layer float32 (B, P, D): what a token that looked only at
  this image token would get from that layer's attention."""
  c, out = model.config, []
  P = c.patches * len(listed(images)[0])
  def watch(q, k, v, *rest):
    layer, (B, K, _, d) = model.net.language_model.layers[len(out)], v.shape
    v = v[:, :, :P].reshape(B, K, 1, P, d).expand(B, K, c.heads // K, P, d).reshape(B, c.heads, P, d)
    x = layer.self_attn.o_proj(v.transpose(1, 2).reshape(B, P, c.heads * d).contiguous())
    out.append((layer.post_attention_layernorm(x) if c.gemma2 else x).contiguous())
  forward(model, images, prompts, [[]] * len(prompts), watch)
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



def fit(draw, text, width, size):
  """-> text, cut if need be, and its font, of this size or less, so that it is at most so wide."""
  for size in range(size, 8, -1):
    font = ImageFont.load_default(size=size)
    if draw.textlength(text, font=font) <= width:
      return text, font
  while text[1:] and draw.textlength(text, font=font) > width:
    text = text[:-1]
  return text, font


def light(image, heat):
  """The picture with heat (G, G) on it: as it is where that is 1, towards NIGHT where it is less. A frame around the
  largest."""
  g = len(heat)
  shade = Image.fromarray(heat.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
  shade = Image.fromarray((255 * (.12 + .88 * np.asarray(shade).clip(0, 1))).astype(np.uint8))
  image = Image.composite(image, Image.new("RGB", image.size, NIGHT), shade)
  y, x = divmod(int(heat.argmax()), g)
  w, h = image.width / g, image.height / g
  ImageDraw.Draw(image).rectangle((x * w, y * h, (x + 1) * w - 1, (y + 1) * h - 1), outline="white")
  return image


def strip(pictures, maps, labels):
  """PIL images of one question, maps (N, P of them all) and N labels -> one picture: a cell for each token, as many
  rows as it takes. Under a cell: the token, and how much of its attention went to the pictures at all."""
  side, gap = round((maps.shape[1] / len(pictures)) ** .5), 6
  small = [image.resize([max(1, round(s * SMALL / max(image.size))) for s in image.size], Image.Resampling.LANCZOS)
           for image in pictures]
  width, height = sum(image.width for image in small), max(image.height for image in small)
  columns = max(1, min(len(labels), STRIP // (width + gap)))
  size = columns * (width + gap) + gap, -(-len(labels) // columns) * (height + 22 + gap) + gap
  sheet = Image.new("RGB", size, "white")
  pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
  for i, (weights, text) in enumerate(zip(maps, labels)):
    x, y = gap + i % columns * (width + gap), gap + i // columns * (height + 22 + gap)
    text, large = fit(pen, text, width - 36, 15)
    pen.text((x + 2, y + height + 11), text, fill="black", font=large, anchor="lm")
    pen.text((x + width, y + height + 11), f"{100 * weights.sum():.0f} %", fill="#777777", font=font, anchor="rm")
    # Each to its own largest, or what is spread wide would not be seen; but what is next to nothing stays dark.
    heats = weights / max(weights.max(), maps.max() / 4, 1e-30)
    for image, heat in zip(small, heats.reshape(len(small), side, side)):
      sheet.paste(light(image, heat), (x, y))
      x += image.width
  return sheet


def grid(image, texts, near):
  """PIL image and, for each image token, row by row, a text and its cosine -> a larger picture with all of them on it,
  the farther the fainter."""
  side = round(len(texts) ** .5)
  w, h = CELL, max(18, round(CELL * image.height / image.width))
  image = image.resize((w * side, h * side), Image.Resampling.LANCZOS)
  lines = Image.new("RGBA", image.size)
  pen = ImageDraw.Draw(lines)
  for i, text in enumerate(texts):
    x, y, alpha = i % side * w, i // side * h, round(255 * max(.2, near[i] / max(near.max(), 1e-30)))
    pen.rectangle((x, y, x + w, y + h), outline="#80808080")
    text, font = fit(pen, plain(text), w - 6, 14)
    pen.text((x + w / 2, y + h / 2), text, (255, 255, 255, alpha), font, "mm", stroke_width=1,
             stroke_fill=(0, 0, 0, alpha))
  image.paste(lines, mask=lines)
  return image


def side_by_side(images):
  sheet = Image.new("RGB", (sum(i.width for i in images), max(i.height for i in images)), "white")
  for i, image in enumerate(images):
    sheet.paste(image, (sum(before.width for before in images[:i]), 0))
  return sheet


# ---- 4. Does it mean anything ----


def inside(box, size, side):
  """Box in pixels of a picture of this size -> how much of each patch lies in it (P,), and whether its centre does."""
  shares, centers = [], []
  for low, high in ((box[1] / size[1], box[3] / size[1]), (box[0] / size[0], box[2] / size[0])):  # y, then x
    edge = np.arange(side + 1) / side
    shares.append((np.minimum(edge[1:], high) - np.maximum(edge[:-1], low)).clip(0) * side)
    centers.append((low <= edge[:-1] + .5 / side) & (edge[:-1] + .5 / side < high))
  return np.outer(*shares).ravel(), np.outer(*centers).ravel()


def color_words(model, task, scene, prefix, answer):
  """-> (place in the answer, the Object that is meant) for each colour word that is true, and how many are not."""
  texts, found, wrong = [model.tokenizer.piece(id).decode(errors="replace").strip() for id in answer.tokens], [], 0
  for i, text in enumerate(texts):
    if text in shapes.COLORS:
      shape = prefix.rstrip("?").split()[-1] if task == "color" else (texts + [""])[i + 1]
      named = [obj for obj in scene.objects if obj.name == f"{text} {shape}"]
      found += [(i, obj) for obj in named]
      wrong += not named
  return found, wrong


def evaluate(model, count):
  """Print how often the attention of a colour word and the nearest words are about the shape that they should be about,
  on held-out scenes -> {task: of all layers and of each, (layers + 1, 2)}."""
  scenes = [shapes.scene(shapes.TEST_SEED, i) for i in range(count)]
  side = model.config.image_size // model.config.patch_size
  results, chance, others, wrong = attention_of_colors(model, scenes, side)
  if not all(results.values()):
    raise Fault("the answers name no colour that is there: --eval is for weights that know the toy world", code=1)
  means = {task: np.mean(values, 0) for task, values in results.items()}  # (layers + 1, 2)
  def line(title, cells):  # two cells for each of two tasks
    print(f"{title:20}" + "".join(f"{cell:14.3f}" if isinstance(cell, float) else f"{cell:>14}" for cell in cells))
  print(f"{count} held-out scenes. Where the attention of a colour word falls, as a mean of all heads:\n")
  line("", ["caption en", "", "what color", "is ...?"])
  line("", ["maximum", "mass"] * 2)
  for i in range(model.config.layers + 1):
    line(f"layer {i}" if i else "all layers", [float(v) for task in means for v in means[task][i]])
  line("the box's area", [float(np.mean(chance[task])) for task in means for _ in range(2)])
  line("on another shape", [v for task in means for v in (float(np.mean(others[task])), "")])
  line("words", [v for task in means for v in (len(results[task]), "")])
  line("untrue, left out", [v for task in means for v in (wrong[task], "")])
  patches = patches_of_shapes(model, scenes, side)
  print(f"\nThe nearest of {len(words(model.tokenizer))} words, of {len(patches[0])} patches within one shape:\n")
  line("", ["its colour", "its shape"])
  for i, result in enumerate(patches):
    line(f"layer {i} takes" if i else "projected", np.mean(result, 0).tolist())
  return means | {"patches": np.mean(patches, 1)}


def attention_of_colors(model, scenes, side):
  """-> {task: for each colour word of the answers (layers + 1, 2): whether the largest attention lies in the box of the
  shape that it names, and which share of all attention to the picture does}, first of all layers, then of each; {task:
  areas of the boxes}; {task: whether the largest of all layers lies in another's box instead}; {task: untrue words}."""
  asked, tasks = [], ("caption", "color")
  results, chance, others = ({task: [] for task in tasks} for _ in range(3))
  wrong = dict.fromkeys(tasks, 0)
  for i, scene in enumerate(scenes):
    rng, pools = np.random.default_rng((shapes.TEST_SEED, i, 2)), shapes.questions(scene)
    asked += [(task, scene, *pools[task][rng.integers(len(pools[task]))]) for task in tasks if pools[task]]
  asked.sort(key=lambda question: question[0])
  for start in range(0, len(asked), shapes.BATCH):
    batch = asked[start:start + shapes.BATCH]
    _, drawn, prompts, _ = zip(*batch, *batch[-1:] * (shapes.BATCH - len(batch)))  # the last one is filled up
    images = [scene.image for scene in drawn]
    answers = model.generate(images, list(prompts), max_tokens=shapes.MAX_TOKENS)
    maps = attention(model, images, prompts, [answer.tokens for answer in answers])
    for (task, scene, prefix, _), answer, seen in zip(batch, answers, maps):
      found, untrue = color_words(model, task, scene, prefix, answer)
      wrong[task] += untrue
      for i, obj in found:
        heat = np.concatenate([seen[:, i].mean(0, keepdims=True), seen[:, i]])  # (layers + 1, P)
        shares, centers = inside(obj.box, scene.image.size, side)
        results[task].append(np.stack([centers[heat.argmax(1)], heat @ shares / heat.sum(1)], 1))
        chance[task].append(shares.mean())
        rest = [inside(other.box, scene.image.size, side)[1] for other in scene.objects if other != obj]
        others[task].append(not centers[heat[0].argmax()] and any(centers[heat[0].argmax()] for centers in rest))
  return results, chance, others, wrong


def patches_of_shapes(model, scenes, side):
  """-> for the projected features and what each layer takes, a list of (nearest word is its colour, is its name) for
  each patch of which at least 80 % lie within one shape, and nothing within another."""
  results = [[] for _ in range(model.config.layers + 1)]
  for start in range(0, len(scenes), shapes.BATCH):
    batch = scenes[start:start + shapes.BATCH]
    images = [scene.image for scene in batch + batch[-1:] * (shapes.BATCH - len(batch))]
    projected = np.concatenate([model.image_features(image).numpy() for image in images])  # (B, P, D)
    for result, features in zip(results, [projected] + taken(model, images, ["caption en"] * len(images))):
      texts = np.array(nearest(model, features.reshape(-1, features.shape[-1]))[0]).reshape(len(images), -1)
      for scene, labels in zip(batch, texts):
        covers = np.stack([np.asarray(obj.coverage.resize((side, side), Image.Resampling.BOX)).ravel() / 255
                           for obj in scene.objects])  # (objects, P)
        for obj, cover in zip(scene.objects, covers):
          own = (cover >= .8) & (covers.sum(0) == cover)
          result += [(text == obj.color, text == obj.shape) for text in labels[own]]
  return results


# ---- 5. Command line ----


def add_arguments(parser):
  """The options of `python vlm.py` that show what the model looks at."""
  g = parser.add_argument_group("looking inside")
  g.add_argument("--show", choices=("attention", "patches"), help="a picture of where each token of the answer looked, "
                 "or of the word nearest to each image token (--out, default: IMAGE.attention.png, IMAGE.patches.png)")
  g.add_argument("--layer", type=int, metavar="N", help="of the Nth layer alone, 1 the first: where it looked, or what "
                 "it takes from each image token")


def check(args):
  """What can be wrong with these options, before the slow part. Raises Fault."""
  if args.layer is not None and not args.show:
    raise Fault("--layer goes with --show")
  if args.layer is not None and args.layer < 1:
    raise Fault(f"--layer {args.layer}: the first layer is 1")
  others = {"--train": args.train is not None, "--batch": isinstance(args.batch, str), "--json": args.json}
  for flag, given in others.items():
    if args.show and given:
      raise Fault(f"--show makes a picture of one answer; leave out {flag}")
  if args.show == "attention" and args.inputs and batch.split(args.inputs)[1] is None:
    raise Fault("--show attention shows an answer, so it needs a prompt")


def run(model, names, prompt, args):
  """What `python vlm.py --show` does with a loaded model -> exit code. Raises Fault."""
  if args.layer and args.layer > model.config.layers:
    raise Fault(f"--layer {args.layer}: this model has {model.config.layers}")
  pictures, out = [vlm.open_image(name) for name in names], args.out or f"{Path(names[0]).stem}.{args.show}.png"
  draw.check_output(out, names)
  if args.show == "patches":
    if args.layer:
      features = taken(model, [pictures], [prompt])[args.layer - 1][0]
    else:
      features = np.concatenate([model.image_features(picture).numpy()[0] for picture in pictures])
    texts, near = nearest(model, features)
    parts = [slice(i, i + model.config.patches) for i in range(0, len(texts), model.config.patches)]
    grids = [grid(picture, texts[part], near[part]) for picture, part in zip(pictures, parts)]
    draw.save_picture(side_by_side(grids), out, names)
    vlm.say(args, f"nearest words of {len(texts)} image tokens drawn: {out}")
    return 0
  [answer] = model.generate([pictures], [prompt], max_tokens=args.max_tokens, temperature=args.temperature,
                            top_k=args.top_k, top_p=args.top_p, seed=args.seed)
  vlm.status("")
  print(answer.text, flush=True)
  if not answer.tokens:
    vlm.say(args, f"the answer is empty: {out} not written")
    return 0
  [maps] = attention(model, [pictures], [prompt], [answer.tokens])
  maps = maps[args.layer - 1] if args.layer else maps.mean(0)
  labels = [label(model.tokenizer, id) for id in answer.tokens]
  draw.save_picture(strip(pictures, maps, labels), out, names)
  vlm.say(args, f"attention of {len(labels)} tokens drawn: {out}")
  return 0


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--eval", action="store_true", required=True, help="measure both pictures on held-out scenes")
  parser.add_argument("--weights", default=Path(__file__).resolve().parents[1] / "weights/toy",
                      help="checkpoint (default weights/toy)")
  parser.add_argument("--scenes", type=int, default=200, help="held-out scenes to measure on (default 200)")
  options = parser.parse_args()
  try:
    if options.scenes < 1:
      raise Fault("--scenes: at least 1")
    evaluate(vlm.load(options.weights), options.scenes)
  except Fault as e:
    sys.exit(f"show: {e}")
