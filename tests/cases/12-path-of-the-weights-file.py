"""The path of the weights file itself, and a folder of the Hub's cache.

Command: comparator run -m FOLDER/model.safetensors …, and -m models--org--name (its snapshots inside)
Right: both open what they mean, with the tokens of the folder.
"""

import shutil

from common import folder, run, tiny, verdict

path = tiny()
want = run(path).cell()["token_ids"]
cache = folder("hub") / "models--org--name"
shutil.copytree(path, cache / "snapshots" / ("0" * 40))
(cache / "refs").mkdir()
(cache / "refs" / "main").write_text("0" * 40)
a, b = run(path / "model.safetensors"), run(cache)
verdict(all(s.ok and s.cell()["token_ids"] == want for s in (a, b)), f"file: {a.line} / cache: {b.line}")
