"""What every backend has to be, whichever methods it offers. A new file in comparator/backends is tested by this."""

from __future__ import annotations

import ast
import inspect
import re

import pytest

from comparator.backends import all_backends, backend_for, methods, most_precise, presets, resolve
from comparator.backends.base import Backend, Option, Placement
from comparator.core.errors import UserError
from comparator.core.variant import Variant

BACKENDS = all_backends()
METHODS = [pytest.param(backend, method, id=method.name) for backend, method in methods().values()]
OPTIONS = [
    pytest.param(backend, method, option, id=f"{method.name}-{option.name}")
    for backend, method in methods().values()
    for option in method.options
]


def notation(method, option: Option, value: str) -> str:
    return f"{method.name}:{option.form.format(name=option.name, value=value)}"


def good_values(option: Option) -> list[str]:
    if option.kind == "flag":
        return ["true"]
    if option.kind == "number":
        return [f"{v:g}" for v in (option.minimum or 0, option.maximum) if v is not None]
    return list(option.choices) or ["something"]


def test_the_methods_of_the_design_are_there():
    assert {"fp32", "fp16", "bf16", "int8", "nf4", "fp4"} <= set(methods())
    names = [m.name for b in BACKENDS for m in b.methods]
    assert len(names) == len(set(names)), "two backends offer the same method"


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_a_backend_describes_itself(backend: Backend):
    assert isinstance(backend, Backend) and re.fullmatch(r"[a-z0-9_]+", backend.name)
    assert backend.methods and isinstance(backend.requires, tuple)
    reason = backend.unavailable()
    assert reason is None or (isinstance(reason, str) and reason), "None, or the reason in words"
    if backend.runtime == "transformers":
        assert type(backend).load is not Backend.load, "load is the one method that has to be written"
    assert type(backend).tensor_sizes is not Backend.tensor_sizes, (
        "what does not fit is refused before it loads"
    )
    assert inspect.getmodule(type(backend)).__doc__


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_a_missing_library_is_named(backend: Backend, monkeypatch):
    monkeypatch.setattr(type(backend), "requires", (*backend.requires, "no_such_library_here"))
    assert "no_such_library_here" in backend.unavailable()


@pytest.mark.parametrize(("backend", "method"), METHODS)
def test_a_method_describes_itself(backend, method):
    assert re.fullmatch(r"[a-z0-9_]+", method.name) and method.title
    assert method.summary.endswith("."), "a sentence"
    assert method.bits > 0 and method.precision > 0
    names = [o.name for o in method.options]
    assert len(names) == len(set(names))
    assert resolve(method.name).notation == method.name, "the bare method has to be possible"
    for preset in method.presets:
        assert resolve(preset).notation == preset, "a preset is written in its canonical form"
        assert resolve(preset).method == method.name


@pytest.mark.parametrize(("backend", "method", "option"), OPTIONS)
def test_an_option_describes_itself(backend, method, option):
    assert option.help and not option.help.endswith("."), "help is shown in a list, without a full stop"
    assert option.kind in ("flag", "choice", "number", "names", "text")
    if option.kind == "flag":
        assert option.default in ("true", "false")
    if option.choices and option.default is not None:
        assert option.default in option.choices
    assert "{value}" in option.form or option.kind == "flag"


@pytest.mark.parametrize(("backend", "method", "option"), OPTIONS)
def test_every_value_resolves_and_round_trips(backend, method, option):
    for value in good_values(option):
        written = notation(method, option, value)
        try:
            variant = resolve(written)
        except UserError as problem:  # refused in combination with the other options' defaults: in words
            assert option.name in str(problem) and problem.advice, str(problem)
            continue
        assert resolve(variant.notation) == variant
        assert backend.values(variant)[option.name] == value or option.kind in ("number", "names")
        if value == option.default:
            assert variant.notation == method.name, "a default is left out of the canonical form"
        else:
            assert backend.requested(variant), "a value that is not the default stays"


@pytest.mark.parametrize(("backend", "method"), METHODS)
def test_an_unknown_option_is_named_and_the_valid_ones_listed(backend, method):
    with pytest.raises(UserError) as caught:
        resolve(f"{method.name}:no_such_option=1")
    said = str(caught.value)
    assert "no_such_option" in said and method.name in said
    for option in method.options:
        assert option.name in said or option.example in said, f"{option.name} is not listed"


@pytest.mark.parametrize(
    ("backend", "method", "option"), [p for p in OPTIONS if p.values[2].kind in ("choice", "number")]
)
def test_a_wrong_value_is_named_and_what_is_possible_said(backend, method, option):
    if option.kind == "choice":
        wrong = "99" if all(c.lstrip("-").isdigit() for c in option.choices) else "nonsense"
    else:
        wrong = "nonsense" if option.minimum is None else f"{option.minimum - 1:g}"
    with pytest.raises(UserError) as caught:
        resolve(notation(method, option, wrong))
    said = str(caught.value)
    assert wrong in said or option.name in said
    if option.choices:
        assert all(choice in said for choice in option.choices), said


@pytest.mark.parametrize(("backend", "method"), METHODS)
def test_the_code_is_python(backend, method):
    if backend.runtime != "transformers":
        with pytest.raises(UserError, match=f"no code to copy for {method.name}"):
            backend.code(resolve(method.name), Placement("cpu"))
        return
    for written in method.presets or (method.name,):
        variant = resolve(written)
        imports, setup, arguments = backend.code(variant, Placement("cpu"))
        tree = ast.parse("\n".join([*imports, *setup, f"load({', '.join(arguments)})"]))
        assert isinstance(tree.body[-1], ast.Expr)
        assert all("comparator" not in line for line in (*imports, *setup, *arguments)), (
            "plain transformers only"
        )


def test_an_unknown_method_is_named_and_the_methods_listed():
    with pytest.raises(UserError) as caught:
        backend_for(Variant("nf44"))
    assert "nf44" in str(caught.value) and "nf4" in caught.value.advice and "bf16" in caught.value.advice


def test_presets_and_the_most_precise():
    assert len(presets()) == len(set(presets()))
    offered = {resolve(p).method for p in presets()}
    assert offered == {m.name for _, m in methods().values() if not m.needs_source}
    assert most_precise([resolve(v) for v in ("fp4", "int8", "bf16", "nf4")]).method == "bf16"
    assert most_precise([resolve(v) for v in ("nf4:dq", "fp32")]).method == "fp32"
