"""What Hugging Face transformers answers, for test_vlm.py to compare with.

    python examples/golden.py weights/tiny1      # writes weights/tiny1/golden.npz

Needs torch and transformers beside the packages of requirements.txt, in an environment of its own; golden.npz
was made with torch 2.13.0 and transformers 5.23.0. The three tiny folders are `make` below on the sizes in
their config.json with seed 22 (tiny1, Gemma 1), 2 (tiny2, Gemma 2; in three shards, with the names that hub
files have) and 3 (tiny2-28b, Gemma 2 with a query scale that is not head_dim^-0.5), and a "note" in
config.json. Their tokenizers are SentencePiece models with Gemma's options, trained on docstrings of Python's
library.
"""
import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SEED, TOKENS = 20, 32
PROMPTS = ["caption en", "detect cat ; dog",
           "answer en what is left of <loc0512><loc0031> or above the blue square?"]

def pixels(side, count=2, seed=SEED):
  """(count, 3, side, side) float32 in [-1, 1]"""
  return np.random.default_rng(seed).uniform(-1, 1, (count, 3, side, side)).astype(np.float32)

def make(folder, config, seed, dtype="float32"):
  """A folder with random weights of the sizes in `config` (what a config.json holds) and tiny1's
  tokenizer."""
  import torch
  from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration
  torch.manual_seed(seed)
  torch.set_default_dtype(getattr(torch, dtype))
  try:
    model = PaliGemmaForConditionalGeneration(PaliGemmaConfig.from_dict(config))
    with torch.no_grad():
      for name, p in model.named_parameters():
        norm, layer_norm = "norm" in name, "vision_tower" in name and "norm" in name
        if name.endswith("language_model.norm.weight"):
          # Large, and small embeddings: the tied head would only repeat the last token otherwise.
          value = torch.randn_like(p) * 0.5 + 8
        elif p.ndim == 1:
          value = torch.randn_like(p) * (0.1 if norm else 0.05) + (layer_norm and name.endswith("weight"))
        elif "embed_tokens" in name:
          value = torch.randn_like(p) * 0.3 * p.shape[1] ** -0.5
        else:
          value = torch.randn_like(p) * p[0].numel() ** -0.5
        p.copy_(value)
  finally:
    torch.set_default_dtype(torch.float32)
  model.save_pretrained(folder)
  shutil.copy(ROOT / "weights" / "tiny1" / "tokenizer.model", folder)

def random_config(rng, gemma2):
  """Sizes of a small model, drawn so that no two that could be mixed up are likely to be alike."""
  heads, kv_heads, patch = int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(rng.choice([7, 10, 14]))
  vision_heads, layers = int(rng.integers(1, 5)), int(rng.integers(2, 5))
  # transformers wants a multiple of these
  width = int(rng.integers(40, 80)) // (heads * kv_heads) * heads * kv_heads
  text = dict(model_type="gemma2" if gemma2 else "gemma", hidden_size=width, vocab_size=1536,
              intermediate_size=int(rng.integers(50, 150)), num_hidden_layers=layers,
              num_attention_heads=heads * kv_heads, num_key_value_heads=kv_heads,
              head_dim=int(rng.choice([8, 16, 24])),
              rms_norm_eps=float(rng.choice([1e-6, 1e-3])),
              rope_parameters={"rope_type": "default", "rope_theta": float(rng.choice([1e2, 1e4, 1e6]))})
  if gemma2:  # caps far below the published 50 and 30, that they bite on the small logits of random weights
    text |= dict(sliding_window=int(rng.integers(2, 12)), query_pre_attn_scalar=int(rng.integers(4, 40)),
                 attn_logit_softcapping=float(rng.uniform(0.5, 3)),
                 final_logit_softcapping=float(rng.uniform(2, 10)))
  vision = dict(model_type="siglip_vision_model", vision_use_head=False, num_attention_heads=vision_heads,
                patch_size=patch, image_size=patch * int(rng.integers(2, 6)),
                hidden_size=vision_heads * int(rng.integers(2, 6)) * 4,
                layer_norm_eps=float(rng.choice([1e-6, 1e-3])),
                intermediate_size=int(rng.integers(30, 100)), num_hidden_layers=int(rng.integers(1, 4)))
  return dict(model_type="paligemma", vision_config=vision, text_config=text, hidden_size=text["hidden_size"],
              projection_dim=text["hidden_size"], image_token_index=1535)

def next_logits(model, image, prompt):
  """vlm.py's logits of the answer's first token, (V,)."""
  return model.prefix([image], [prompt], 1)[1].numpy()[0]

def load(folder, dtype="float32"):
  """transformers' model in float32, whatever the file holds; but the embeddings' factor is that of the file's
  type."""
  import torch
  from transformers import PaliGemmaForConditionalGeneration
  model = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype),
                                                            attn_implementation="eager").eval()
  config, table = json.loads((Path(folder) / "config.json").read_text()), model.get_input_embeddings()
  stored = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
  table.embed_scale.copy_(table.embed_scale.to(stored))
  return model

def reference(model, pixels, ids, tokens=TOKENS, each=1):
  """pixels (B * each, 3, S, S), `each` pictures a row, ids after the images -> vision (B * each, P, Dv),
  projected (B * each, P, D), logits (B, V) after the prefix, tokens (B, N): greedy, going on after an end
  token."""
  import torch
  with torch.no_grad():
    pixels = torch.tensor(pixels).to(model.dtype)
    features = model.get_image_features(pixels)
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    prefix = torch.tensor([[model.config.image_token_id] * patches * each + ids] * (len(pixels) // each))
    out = model(input_ids=prefix, pixel_values=pixels, token_type_ids=torch.zeros_like(prefix),
                attention_mask=torch.ones_like(prefix), use_cache=True)
    logits, chosen = out.logits[:, -1], []
    for seen in range(prefix.shape[1] + 1, prefix.shape[1] + tokens + 1):
      token = out.logits[:, -1].argmax(-1, keepdim=True)
      chosen.append(token)
      out = model(input_ids=token, past_key_values=out.past_key_values, token_type_ids=torch.ones_like(token),
                  attention_mask=torch.ones(len(token), seen, dtype=torch.long), use_cache=True)
  stages = {"vision": features.last_hidden_state, "projected": features.pooler_output, "logits": logits}
  stages = {name: stage.float().numpy() for name, stage in stages.items()}
  return stages | {"tokens": torch.cat(chosen, 1).numpy()}

def main():
  p = argparse.ArgumentParser(prog="golden.py", description="Write what transformers answers: golden.npz.")
  p.add_argument("folder", metavar="DIR", help="PaliGemma's folder")
  folder = p.parse_args().folder
  sys.path.insert(0, str(ROOT))
  from tokenizer import Tokenizer
  model, tokenizer = load(folder), Tokenizer(Path(folder) / "tokenizer.model")
  images = pixels(model.config.vision_config.image_size)
  runs = [reference(model, images, tokenizer.prompt(prompt)) for prompt in PROMPTS]
  # the second prompt, on both pictures
  both = reference(model, images, tokenizer.prompt(PROMPTS[1]), each=len(images))
  # (images, prompts, ..)
  logits, tokens = (np.stack([run[key] for run in runs], 1) for key in ("logits", "tokens"))
  np.savez_compressed(Path(folder) / "golden.npz", seed=SEED, prompts=PROMPTS, vision=runs[0]["vision"],
                      both_logits=both["logits"][0], both_tokens=both["tokens"][0].astype(np.int32),
                      projected=runs[0]["projected"], logits=logits, tokens=tokens.astype(np.int32))

if __name__ == "__main__":
  main()
