"""Renders chat templates, as a program of its own: a line of JSON in, a line of JSON out. Needs jinja2 and nothing of this package.

A template is code from whoever made the model, in a sandbox that bounds neither time nor memory: one loop inside another
runs for hours, one multiplication makes a string of gigabytes. So it runs in this process, which the kernel ends.

Arguments: the search path for jinja2. Ends with its stdin.
In: {"template", "conversations": [messages], "fixed", "variables", "cpu_s", "bytes"}.
Out: {"texts": [{"text"} or {"error"}], "variables": names that the template reads}, or {"error"}.
The environment is that of transformers' `apply_chat_template`.
"""

import json
import sys
import time
from datetime import datetime
from functools import lru_cache

MOST_CHARACTERS = 2_000_000


@lru_cache(maxsize=2)
def _compiled(source: str):
    """The template, and the names that it reads."""
    from jinja2 import Environment, TemplateError, ext, meta, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %} marks what an assistant wrote, for training; it prints its inside."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

        def _inside(self, caller):
            return caller()

    def refuse(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment: Environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    reads = meta.find_undeclared_variables(environment.parse(source)) - set(environment.globals)
    return environment.from_string(source), reads


def answered(request: dict) -> dict:
    template, reads = _compiled(request["template"])
    reads = reads - request["fixed"].keys() - {"messages"}
    texts = []
    for messages in request["conversations"]:
        try:
            text = template.render(messages=messages, **{**request["fixed"], **request["variables"]})
            texts.append(
                {"text": text}
                if len(text) <= MOST_CHARACTERS
                else {"error": f"it printed {len(text):,} characters"}
            )
        except MemoryError:
            raise
        except Exception as error:  # a TemplateError, or whatever an expression of the template raises
            texts.append({"error": str(error).split("\n")[0] or type(error).__name__})
    return {"texts": texts, "variables": sorted(reads)}


def _limit(cpu_s: float, size: int) -> None:
    """What this process may take until the next request: the kernel ends it over CPU time, also when the parent is gone."""
    try:
        import resource
    except ImportError:  # Windows: the parent's clock alone
        return
    for kind, most in (
        (resource.RLIMIT_CPU, int(time.process_time() + cpu_s) + 1),
        (resource.RLIMIT_AS, size),
    ):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        _limit(request["cpu_s"], request["bytes"])
        try:
            answer = answered(request)
        except MemoryError:
            answer = {"error": "it took more memory than allowed"}
        except RecursionError:
            answer = {"error": "it recurses endlessly"}
        except Exception as error:  # a template that jinja2 cannot parse
            answer = {"error": str(error).split("\n")[0] or type(error).__name__}
        print(json.dumps(answer), flush=True)
        if "memory" in answer.get("error", ""):
            return  # the next one begins with all of it


if __name__ == "__main__":
    sys.path[:] = sys.argv[1:]
    main()
