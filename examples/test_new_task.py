"""Tests of new_task.py: its answers are those of the scenes."""
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
import new_task
import shapes


def lines(folder):
  return [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]


def test_answers_are_those_of_the_scene(tmp_path):
  assert new_task.main([str(tmp_path / "exam"), "--count", "60", "--known", "0"]) in (0, None)
  seen = set()
  for line in lines(tmp_path / "exam"):
    scene = shapes.scene(92, int(line["image"][:-4]))
    words = line["prefix"].rstrip("?").split()
    if "there" in words:
      there = " ".join(words[-2:]) in [obj.name for obj in scene.objects]
      assert line["suffix"] == ("yes" if there else "no")
    else:
      [color] = [obj.color for obj in scene.objects if obj.shape == words[-1]]
      assert line["suffix"] == new_task.SPANISH[color]
    seen.add(line["suffix"])
  assert seen == {"yes", "no", *new_task.SPANISH.values()}
  assert len(lines(tmp_path / "exam")) == 120 and len({line["image"] for line in lines(tmp_path / "exam")}) == 60


def test_known_questions_stand_beside_the_new_ones(tmp_path):
  assert new_task.main([str(tmp_path / "lessons"), "--count", "12", "--known", "3"]) in (0, None)
  asked = lines(tmp_path / "lessons")
  old = [line for line in asked if line["suffix"] not in ("yes", "no", *new_task.SPANISH.values())]
  assert len(asked) - len(old) == 24 and 24 < len(old) <= 36 and all(line["suffix"] for line in asked)
  assert any(line["prefix"].startswith("segment ") for line in old)
  new_task.main([str(tmp_path / "exam"), "--count", "12", "--known", "0"])
  pictures = [{path.read_bytes() for path in (tmp_path / name).glob("*.png")} for name in ("lessons", "exam")]
  assert not pictures[0] & pictures[1], "the exam has pictures of the lessons"


@pytest.mark.parametrize("argv, word", [([], "required"), (["DIR", "--count", "0"], "--count"),
                                        (["DIR", "--known", "-1"], "--known"), (["."], "not empty")])
def test_faults(argv, word, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "mine").touch()
  assert new_task.main(argv) == 2
  captured = capsys.readouterr()
  assert word in captured.err and captured.err.count("\n") == 1 and not captured.out
