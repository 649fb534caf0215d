"""A system prompt for a model whose template raises on the system role.

Command: comparator run -m FOLDER -v bf16 --system "Be brief." -p Hello
Right: refused before any weights are loaded, quoting the template's reason, with a way out.
"""

from common import run, tiny, verdict

path = tiny()
(path / "chat_template.jinja").write_text(
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{{ m['content'] }}{% endfor %}"
)
said = run(path, extra=("--system", "Be brief."))
verdict(not said.ok and said.names(r"system", r"template") and not said.names(r"Loading weights"), said.line)
