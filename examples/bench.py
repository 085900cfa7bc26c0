"""Measurements and checks at full size. They need memory and minutes, so they are not in the tests.

    python examples/bench.py --check DIR --python REFERENCE      top-1 of the prefix logits, ours and transformers'

REFERENCE is a Python with torch and transformers, in an environment of its own (see .ci/run).
"""
import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
import golden
import vlm

PROMPTS = ["caption en", "detect cat ; dog", "answer en what color is the square?", "describe en"]

REFERENCE = """
import json, sys
import numpy as np, torch
from transformers import PaliGemmaForConditionalGeneration
folder, job, out = sys.argv[1:]
model = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype="auto").eval()
job, logits = np.load(job), []
pixels, patches = torch.tensor(job["pixels"]).to(model.dtype), int(job["patches"])
for i in range(int(job["count"])):
  ids = torch.tensor([[model.config.image_token_id] * patches + job[f"ids{i}"].tolist()])
  with torch.no_grad():
    out_i = model(input_ids=ids, pixel_values=pixels, token_type_ids=torch.zeros_like(ids),
                  attention_mask=torch.ones_like(ids), logits_to_keep=1)
  logits.append(out_i.logits[0, -1].float().numpy())
np.save(out, np.stack(logits))
"""

def check(folder, python):
  """Compare the prefix logits of a few prompts with transformers' in the checkpoint's own number type -> agreement."""
  model, agree = vlm.load(folder), []
  pixels = golden.pixels(model.config.image_size, 1)
  ours = np.stack([model.logits(pixels[0], prompt) for prompt in PROMPTS])
  print(f"ours: {model.timings['load_s']:.2f} s load, {model.timings['prefill_s']:.2f} s last prefill", flush=True)
  ids = {f"ids{i}": np.array(model.tokenizer.prompt(prompt)) for i, prompt in enumerate(PROMPTS)}
  patches = model.config.patches
  del model  # two full-size models do not fit the memory of a small machine
  with tempfile.TemporaryDirectory() as tmp:
    job, out = Path(tmp) / "job.npz", Path(tmp) / "out.npy"
    np.savez(job, pixels=pixels, patches=patches, count=len(PROMPTS), **ids)
    subprocess.run([python, "-c", REFERENCE, folder, job, out], check=True)
    theirs = np.load(out)
  print(f"{'prompt':40}{'ours':>8}{'theirs':>8}{'error / std':>13}{'their margin / std':>20}")
  for prompt, a, b in zip(PROMPTS, ours, theirs):
    error = np.abs(a - b).max() / b.std()
    margin = (b.max() - b[a.argmax()]) / b.std()  # how much less likely they find our token than theirs
    agree.append(a.argmax() == b.argmax() or margin < 2 ** -7 * np.abs(b).max() / b.std())  # bfloat16 keeps 8 bits
    print(f"{prompt:40}{a.argmax():8}{b.argmax():8}{error:13.4f}{margin:20.4f}")
  return all(agree)

if __name__ == "__main__":
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("folder", metavar="DIR")
  p.add_argument("--check", action="store_true", required=True)
  p.add_argument("--python", required=True, metavar="REFERENCE")
  args = p.parse_args()
  try:
    sys.exit(0 if check(args.folder, args.python) else 1)
  except vlm.Fault as e:
    sys.exit(f"bench: {e}")
