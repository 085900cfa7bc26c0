"""Loss and gradients of a PaliGemma one layer at a time. Of a layer only its input is kept; when its gradient
is needed all else is computed again (arxiv.org/abs/1604.06174), so memory hardly grows with the depth. One
compiled program serves all layers of a kind: their weights are its inputs. For as many of the last layers as
memory is given for, one program computes the loss and the gradients at once, and nothing again."""
import copy
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
import vlm

# part: what is called, name: its path in the model, run(part, x, *extras) -> x of the next one, extras: names
# of what else it takes of a batch
Stage = namedtuple("Stage", "kind name part run extras")
BATCH = "pixels", "ids", "labels", "full", "sliding", "cos", "sin"  # as vlm.loss takes them


def rebuilt(thing, values, name=""):
  """A layer whose tensors are those of {name: Tensor}; it shares its other attributes with the original."""
  if isinstance(thing, Tensor):
    return values[name]
  if isinstance(thing, list):
    return [rebuilt(part, values, f"{name}.{i}".lstrip(".")) for i, part in enumerate(thing)]
  if not get_state_dict(thing):
    return thing
  new = copy.copy(thing)
  for key, part in vars(thing).items():
    setattr(new, key, rebuilt(part, values, f"{name}.{key}".lstrip(".")))
  return new


class Layers:
  """A model in stages. trained: the names of the weights that gradients are for; together: how many of the last
  layers are one stage with the loss."""
  def __init__(self, net, config, trained, together=0):
    self.trained, self.programs, tower = trained, {}, net.vision_tower
    depth = config.text.num_hidden_layers
    alone = depth - min(together, depth)
    # what comes before the first layer, and the last stage
    first, gemma, last = copy.copy(tower), copy.copy(net.language_model), copy.copy(net.language_model)
    first.encoder, first.post_layernorm, gemma.layers = SimpleNamespace(layers=[]), Tensor.contiguous, []
    last.layers = [None] * alone + net.language_model.layers[alone:]  # each at its place in the model
    joined = SimpleNamespace(multi_modal_projector=net.multi_modal_projector, language_model=gemma,
                             vision_tower=SimpleNamespace(post_layernorm=tower.post_layernorm))

    def patches(part, pixels):
      return part.vision_tower(pixels)

    def encoder(part, x):
      return part(x)

    def join(part, x, ids):
      image = part.multi_modal_projector.linear(part.vision_tower.post_layernorm(x))
      image = image.repeat_interleave(len(ids) // len(image), 0)
      return image.cat(part.language_model.embed(ids), dim=1).contiguous()

    def block(part, x, cos, sin, mask):
      return part(x, cos, sin, (mask, mask), None)

    def loss(part, x, labels, cos=None, sin=None, *masks):
      seen = dict(zip(kinds, masks))
      for layer, kind in zip(part.language_model.layers[alone:], mask[alone:]):
        x = layer(x, cos, sin, (seen[kind], seen[kind]), None)
      x = part.language_model.norm(x)[:, -labels.shape[1]:].contiguous()
      logits = part.language_model.logits(x).contiguous()
      return logits.sparse_categorical_crossentropy(labels, ignore_index=-100)
    mask = ["full"] * depth
    if config.text.gemma2:
      mask[::2] = ["sliding"] * len(mask[::2])
    kinds = sorted(set(mask[alone:]))
    self.stages = [
      Stage("patches", "", SimpleNamespace(vision_tower=first), patches, ()),
      *(Stage("encoder", f"vision_tower.encoder.layers.{i}.", part, encoder, ())
        for i, part in enumerate(tower.encoder.layers)),
      Stage("join", "", joined, join, ("ids",)),
      *(Stage("block", f"language_model.layers.{i}.", part, block, ("cos", "sin", mask[i]))
        for i, part in enumerate(net.language_model.layers[:alone])),
      Stage("loss", "", SimpleNamespace(language_model=last), loss, ("labels", *(("cos", "sin", *kinds) if kinds else ())))]
    self.weights = [get_state_dict(stage.part) for stage in self.stages]
    moving = [i for i, stage in enumerate(self.stages) if self.moving(i)]
    self.lowest = min(moving)  # the gradient need not go below

  def moving(self, i):
    """The names, within a stage, of its weights that are trained."""
    return [name for name in self.weights[i] if self.stages[i].name + name in self.trained]

  def call(self, i, x, batch, gradient=None):
    """The stage's output for x, or, with the gradient of that output, those of x and of what is trained in it,
    and of the last stage the loss. All are arrays, since the next call of a program overwrites the tensors it
    returned."""
    stage, weights, moving = self.stages[i], self.weights[i], self.moving(i)
    device, backward = next(iter(weights.values())).device, gradient is not None
    key = stage.kind, *moving, backward, len(stage.extras), x.shape
    if key not in self.programs:
      self.programs[key] = program(stage, [*weights], moving, backward, device)
    inputs = [vlm.upload(x, device), *([vlm.upload(gradient, device)] if backward else [])]
    with vlm.kernels.train(backward):
      outputs = self.programs[key](*inputs, *(batch[name] for name in stage.extras), *weights.values())
    outputs = [t.numpy().copy() for t in outputs]
    if not backward:
      return outputs[0]
    found = dict(zip((stage.name + name for name in moving), outputs[1:]))
    return outputs[0], found, outputs[-1]

  def forward(self, batch):
    """The batch by name -> the inputs of all stages."""
    inputs = [batch["pixels"].numpy()]
    for i in range(len(self.stages) - 1):
      inputs.append(self.call(i, inputs[-1], batch))
      if i < self.lowest:
        inputs[i] = None  # no gradient comes here
    return inputs

  def loss(self, batch):
    """batch: tensors in the order of BATCH."""
    batch = dict(zip(BATCH, batch))
    return float(self.call(len(self.stages) - 1, self.forward(batch)[-1], batch))

  def gradients(self, batch):
    """-> the loss, {name: gradient} of all that is trained, arrays."""
    batch, found, loss = dict(zip(BATCH, batch)), {}, None
    inputs, gradient = self.forward(batch), np.ones((), np.float32)
    for i in reversed(range(self.lowest, len(self.stages))):
      gradient, own, value = self.call(i, inputs.pop(), batch, gradient)
      loss = value if loss is None else loss  # that of the last stage
      for name, g in own.items():  # the embedding is in two stages
        found[name] = found[name] + g if name in found else g
    return float(loss), found


def program(stage, names, moving, backward, device):
  """A stage as a compiled program of x, with `backward` of its output's gradient, of extras and weights. `backward`
  gives gradients, and of the last stage its output too."""
  part, run, extras, last = stage.part, stage.run, len(stage.extras), stage.kind == "loss"

  def forward(x, *inputs):
    layer = rebuilt(part, dict(zip(names, inputs[extras:])))
    return [run(layer, x, *inputs[:extras]).contiguous()]

  def both(x, gradient, *inputs):
    [out], weights = forward(x, *inputs), dict(zip(names, inputs[extras:]))
    found = out.gradient(x, *(weights[name] for name in moving), gradient=gradient)
    return [t.contiguous() for t in found] + [out] * last
  return vlm.capture(both if backward else forward, device)
