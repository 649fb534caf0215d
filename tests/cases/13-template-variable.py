"""A template variable that thinking models read, set from the command line.

Command: comparator run -m FOLDER -v bf16 --template-var enable_thinking=false -p Hello
Right: the prompt's token count is that of the template rendered with the variable. (Another name of the flag is fine:
mend this line then.)
"""

from common import run, tiny, verdict

path = tiny()
(path / "chat_template.jinja").write_text(
    "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if enable_thinking is defined and not enable_thinking %} no no no no no{% endif %}"
)
plain = run(path)
said = run(path, extra=("--template-var", "enable_thinking=false"))
verdict(plain.ok and said.ok and plain.columns[0]["token_ids"] != said.columns[0]["token_ids"], said.line)
