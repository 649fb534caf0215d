"""Every tensor's name begins with `_orig_mod.`.

Reported in public: state dicts saved from a torch.compile'd model keep that prefix; the loader finds none of the names
it wants, initializes the whole model at random and only warns.
Command: comparator run -m FOLDER -v bf16 -p Hello
Right: refused, with how many weights are missing and the cause (the `_orig_mod.` prefix) — or opened with the prefix
taken off, which then gives the same tokens as the clean folder.
"""

from common import put_weights, run, tiny, verdict, weights

path = tiny()
clean = run(path).cell()["token_ids"]
put_weights(path, {f"_orig_mod.{name}": t for name, t in weights(path).items()})
said = run(path)
same = said.ok and said.cell()["token_ids"] == clean
verdict(same or (not said.ok and said.names(r"_orig_mod", r"\d+")), said.line)
