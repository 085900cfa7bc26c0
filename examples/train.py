"""Training: the toy world from random weights, or a folder of pictures on top of a checkpoint. `python vlm.py --train`.

A data folder holds pictures and a data.jsonl with lines {"image": file, "prefix": question, "suffix": answer}, the format
of PaliGemma's own fine-tunes. A run's folder (--save) is a complete PaliGemma folder, plus training.safetensors (what
--resume needs), loss.csv and loss.png.
"""
import csv
import json
import math
import os
import queue
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tinygrad import Tensor, dtypes
from tinygrad.nn.state import get_state_dict

import shapes
import vlm
from tokenizer import LOC, Tokenizer

TEXT = 40      # text positions of a toy batch: the longest question and answer of the toy world have 39 tokens
QUESTIONS = 4  # a toy picture is asked so many questions at once: SigLIP runs once for all of them
TOY = {
  "model_type": "paligemma", "image_token_index": 424 + 1024 + 128, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
  "hidden_size": 128, "projection_dim": 128, "dtype": "float32", "architectures": ["PaliGemmaForConditionalGeneration"],
  "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4,
                    "num_attention_heads": 4, "image_size": 112, "patch_size": 14, "vision_use_head": False},
  "text_config": {"model_type": "gemma", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
                  "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32, "num_image_tokens": 64,
                  "vocab_size": 1584, "max_position_embeddings": 1024},
}

def toy_weights(net, config, tokenizer, seed=0):
  """Random weights for a model that has seen nothing yet: norms are the identity, matrices keep the variance."""
  rng = np.random.default_rng(seed)
  for name, t in get_state_dict(net).items():
    if t.ndim == 1:
      identity = "layer_norm" in name or "layernorm" in name and "vision" in name
      value = np.full(t.shape, 1.0 if identity and name.endswith("weight") else 0.0)
    else:
      value = rng.standard_normal(t.shape) * math.prod(t.shape[1:]) ** -0.5
      if name.endswith(("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")):
        value *= (2 * config.layers) ** -0.5  # what every block adds to the residual stream
    if "position_embedding" in name:  # start from waves in y and x: near patches are alike from the first step on
      side = config.image_size // config.patch_size
      y, x = (waves(axis.ravel() / side, t.shape[1] // 2) for axis in np.mgrid[:side, :side])
      value = np.concatenate([y, x], 1)
    if "embed_tokens" in name:  # the same for <loc0000> .. <loc1023>: near places are near in the embedding
      start = tokenizer.ids["<loc0000>"]
      value[start:start + LOC] = waves(np.arange(LOC) / LOC, t.shape[1]) * (2 / t.shape[1]) ** 0.5
    t.replace(Tensor(value.astype(np.float32)).realize())

def waves(position, width):
  """position (n,) in 0..1 -> (n, width): sines and cosines of half a wave up to many."""
  angle = position[:, None] * np.pi * np.geomspace(1, 200, width // 2)
  return np.concatenate([np.sin(angle), np.cos(angle)], 1)

PARTS = {"all": "", "projector": r"multi_modal_projector\.", "attention": r"language_model.*self_attn\.",
         "language": r"language_model\."}  # --train-only: which weights move; attention alone is big_vision's own recipe

def hub_name(name):
  """The reverse of `canonical`: the name that hub files use."""
  for new, old in (("language_model.", "language_model.model."), ("vision_tower.", "vision_tower.vision_model.")):
    if name.startswith(new):
      return old + name[len(new):]
  return name

def save_file(tensors, path):
  """{name: array} -> a safetensors file, whole or not at all: a kill leaves the old one."""
  from safetensors.numpy import save_file
  path = Path(path)
  save_file(tensors, path.with_name(path.name + ".part"), metadata={"format": "pt"})
  os.replace(path.with_name(path.name + ".part"), path)

class Trainer:
  """AdamW on the weights whose names match `part` (a key of PARTS), in one compiled step; no gradient for the rest."""

  def __init__(self, net, config, part="all"):
    self.net, self.config = net, config
    self.weights = {n: t for n, t in get_state_dict(net).items() if re.match(PARTS[part], n)}
    self.optimizer = nn.optim.AdamW(list(self.weights.values()), lr=0.0, b2=0.99)
    self.step_jit, self.loss_jit = TinyJit(self._step), TinyJit(self._loss)
    self.step_jit.cnt = self.loss_jit.cnt = 1

  def batch(self, rows, pixels, T):
    """rows: B pairs of ids (prefix, answer with its eos); pixels (G, 3, S, S) -> what a step takes. T: text positions."""
    P, device = self.config.patches, self.optimizer.device
    ids, weight = np.zeros((len(rows), T + 1), np.int32), np.zeros((len(rows), T), np.float32)
    for i, (prefix, answer) in enumerate(rows):
      ids[i, :len(prefix) + len(answer)] = prefix + answer
      weight[i, len(prefix) - 1:len(prefix) + len(answer) - 1] = 1
    lengths = [P + len(prefix) for prefix, _ in rows], [P + len(prefix) + len(answer) for prefix, answer in rows]
    masks = [training_mask(*lengths, P + T, window)[:, None] for window in (None, self.config.window)]
    cos, sin = rope_table(self.config, np.arange(P + T))
    return [Tensor(t, device=device).realize() for t in (pixels, ids, cos, sin, *masks, weight)]

  def _loss(self, pixels, ids, cos, sin, full, sliding, weight):
    return loss(self.net, pixels, ids, cos, sin, (full, sliding), weight)

  def _step(self, *batch):
    value = self._loss(*batch)
    gradients = value.gradient(*self.weights.values())
    norm = Tensor.stack(*[g.square().sum() for g in gradients]).sum().sqrt()
    clip = (1 / (norm + 1e-6)).minimum(1).contiguous()  # to a norm of 1
    for t, g in zip(self.weights.values(), gradients):
      t.grad = g * clip
    return value.realize(*self.optimizer.schedule_step())

  def step(self, batch, lr):
    """One update -> the loss before it."""
    self.optimizer.lr.assign(Tensor([lr], device=self.optimizer.device)).realize()
    with Tensor.train():
      return self.step_jit(*batch).item()

  def loss(self, batch):
    return self.loss_jit(*batch).item()

class Toy:
  """Scenes drawn as they are needed: batch i of a seed is always the same."""

  def __init__(self, tokenizer, config, rows):
    self.tokenizer, self.side, self.pictures, self.text = tokenizer, config.image_size, max(1, rows // QUESTIONS), TEXT

  def batch(self, i, seed=shapes.TRAIN_SEED):
    """-> rows (prefix ids, answer ids), pixels (G, 3, S, S)."""
    rows, pixels = [], []
    for n in range(self.pictures):
      image, asked = shapes.examples(seed, i * self.pictures + n, QUESTIONS)
      pixels.append(vlm.to_pixels(image, self.side))
      rows += [(self.tokenizer.prompt(prefix), self.tokenizer.encode(suffix) + [1]) for prefix, suffix in asked]
    return rows, np.concatenate(pixels)

  def validation(self):
    return self.batch(0, shapes.VALID_SEED)

  def sample(self):
    image, asked = shapes.examples(shapes.VALID_SEED, 0, QUESTIONS)
    return image, *asked[0]
