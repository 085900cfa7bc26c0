"""Pictures and what is said of them, as people have them: to train on. Imports nothing of vlm."""
import csv
import json
from pathlib import Path

from tokenizer import Fault, check_text, regular

QUESTION = "caption en"  # where only the answer is given


def read(folder):
  """[(path of a picture, question, answer)] of a folder with a data.jsonl, whose lines are {"image": file,
  "prefix": question, "suffix": answer}, or with a captions.csv of image and caption, or with a *.json of COCO's
  detections, or with one subfolder for each label. Raises Fault, which names the first bad line."""
  folder = Path(folder)
  lines, table = folder / "data.jsonl", folder / "captions.csv"
  if not folder.is_dir():
    raise Fault(f"{folder}: no such folder")
  if lines.exists():
    found = from_lines(lines)
  elif table.exists():
    found = from_table(table)
  elif coco := sorted(folder.glob("*.json")):
    found = from_coco(coco[0])
  else:
    found = [(path, QUESTION, path.parent.name) for path in sorted(folder.glob("*/*"))
             if path.is_file() and not path.name.startswith(".")]
  if len(found) < 10:
    raise Fault(f"{folder}: {len(found)} pictures with a text; at least 10 are needed, in a data.jsonl, a "
                "captions.csv, a COCO *.json or one subfolder for each label")
  return found


def from_lines(path):
  found = []
  for number, line in enumerate(read_text(path).split("\n"), 1):
    try:
      example = json.loads(line) if line.strip() else None
      if example:
        image, question, answer = (example[key] for key in ("image", "prefix", "suffix"))
        found.append((path.parent / (image + ""), question + "", answer.strip() + ""))
        checked(found[-1])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
      raise Fault(f"{path}, line {number}: needs image, prefix and suffix, three strings, as JSON") from None
    except Fault as e:
      raise Fault(f"{path}, line {number}: {e}") from None
  return found


def from_table(path):
  found = []
  try:
    for number, row in enumerate(csv.reader(read_text(path).splitlines(), strict=True), 1):
      if number == 1 and row and not is_file(path.parent / row[0]):
        continue  # the names of the columns
      if row and len(row) != 2:
        raise Fault(f"{path}, line {number}: {len(row)} columns; an image and its caption are two")
      if row:
        found.append((path.parent / row[0], QUESTION, row[1].strip()))
        try:
          checked(found[-1])
        except Fault as e:
          raise Fault(f"{path}, line {number}: {e}") from None
  except csv.Error as e:
    raise Fault(f"{path}: {e}") from None
  return found


def from_coco(path):
  """COCO's detections: {"images": [{"id", "file_name", "width", "height"}], "categories": [{"id", "name"}],
  "annotations": [{"image_id", "category_id", "bbox": [x, y, width, height]}]} -> for each picture a question
  for all that is on it, answered with its boxes, from left to right within a name."""
  found = []
  try:
    content = json.loads(read_text(path))
    names = {entry["id"]: entry["name"] + "" for entry in content["categories"]}
    boxes = {}
    for number, entry in enumerate(content["annotations"], 1):
      try:
        x, y, w, h = map(float, entry["bbox"])
        if not (w > 0 and h > 0 and entry.get("iscrowd", 0) in (0, 1)):
          raise ValueError
        if not entry.get("iscrowd"):
          boxes.setdefault(entry["image_id"], []).append((names[entry["category_id"]], x, y, x + w, y + h))
      except (ValueError, KeyError, TypeError):
        raise Fault(f"{path}, annotation {number}: needs image_id, category_id and bbox, [x, y, width, height]"
                    ) from None
    for number, image in enumerate(content["images"], 1):
      size = image["width"], image["height"]
      there = sorted(boxes.get(image["id"], []))
      asked = list(dict.fromkeys(name for name, *_ in there))
      if there:
        answer = " ; ".join(f"{locations(box, *size)} {name}" for name, *box in there)
        found.append((picture_of(path.parent, image["file_name"]), f"detect {' ; '.join(asked)}", answer))
        try:
          checked(found[-1])
        except Fault as e:
          raise Fault(f"{path}, image {number}: {e}") from None
  except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, RecursionError):
    raise Fault(f"{path}: needs images, annotations and categories, as COCO's detections have them") from None
  return found


def picture_of(folder, name):
  """A picture's path: beside the JSON file, or in images/ there."""
  return folder / name if is_file(folder / name) else folder / "images" / name


def locations(box, width, height):
  """(x1, y1, x2, y2) in pixels -> "<locY1><locX1><locY2><locX2>", 1023rds of the picture's sides."""
  x1, y1, x2, y2 = box
  values = y1 / height, x1 / width, y2 / height, x2 / width
  return "".join(f"<loc{min(max(round(value * 1023), 0), 1023):04d}>" for value in values)


def is_file(path):
  try:
    return path.is_file()
  except (OSError, ValueError):  # no name that a file can have
    return False


def read_text(path):
  try:
    return regular(path).read_text("utf-8-sig")
  except (OSError, ValueError) as e:
    raise Fault(f"{path}: {getattr(e, 'strerror', None) or 'not UTF-8'}") from None


def checked(sample):
  path, *texts = sample
  for text in texts:
    check_text(text)
  if not is_file(path):
    raise Fault(f"{path.name}: no such image")
  if not texts[1]:
    raise Fault("the text is empty")
