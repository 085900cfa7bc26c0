"""`python vlm.py IMAGE` without a prompt: question after question about the picture."""
import sys

import vlm


def run(model, images, prompt, args):
  """Until an empty line or the end of the input -> exit code. prompt: None."""
  vlm.say(args, "ask about the picture; :image FILE changes it; an empty line leaves")
  while True:
    print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline().strip()
    if not line:
      return 0
    try:
      if line.startswith(":image"):
        name = line.removeprefix(":image").strip()
        vlm.open_image(name)
        images = [name]
      else:
        vlm.ask(model, images, line, args)
    except vlm.Fault as e:
      print(f"vlm: {e}", file=sys.stderr)
