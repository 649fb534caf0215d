"""A chat template that loops for hours.

Command: comparator run -m FOLDER -v bf16 -p Hello
Right: refused within 30 s, saying that the chat template took too long.
"""

from common import run, tiny, verdict

path = tiny()
(path / "chat_template.jinja").write_text(
    "{% for a in range(99999) %}{% for b in range(99999) %}{% if a == -1 %}x{% endif %}{% endfor %}{% endfor %}Hello"
)
said = run(path)
verdict(
    not said.ok and said.code != 124 and said.seconds < 30 and said.names(r"template"),
    f"{said.line} ({said.seconds:.0f} s)",
)
