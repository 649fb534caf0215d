"""A variant's options by its method: checked, completed with defaults, and written in one way. The same for every backend."""

from __future__ import annotations

from typing import ClassVar

from comparator.backends.options import Method, match_option
from comparator.core.errors import UserError
from comparator.core.variant import Variant, sort_options


class Notation:
    """Base of `Backend`."""

    methods: ClassVar[tuple[Method, ...]]

    def check(self, variant: Variant, values: dict[str, str]) -> None:
        """Refuse combinations that make no sense. `values` holds every option, defaults included."""

    def method(self, name: str) -> Method:
        return next(m for m in self.methods if m.name == name)

    def values(self, variant: Variant) -> dict[str, str]:
        """Every option of the variant's method as text, defaults filled in ("" where there is none)."""
        method = self.method(variant.method)
        values = {o.name: o.default if o.default is not None else "" for o in method.options}
        for name, value in variant.options:
            option, text = match_option(method, name, value)
            values[option.name] = text
        return values

    def requested(self, variant: Variant) -> dict[str, str]:
        """Only the options that the notation names, as text."""
        method = self.method(variant.method)
        return {o.name: text for o, text in (match_option(method, n, v) for n, v in variant.options)}

    def canonical(self, variant: Variant) -> Variant:
        """Validate, drop defaults, sort. Raises `UserError` that names the option and lists the valid ones."""
        method = self.method(variant.method)
        if variant.source and not method.takes_source:
            raise UserError(
                f"{method.name} takes no source after an @.",
                "It quantizes the comparison's own model as it loads.",
            )
        options: dict[str, str | None] = {}
        for name, value in variant.options:
            option, text = match_option(method, name, value)
            if text == option.default:
                continue
            token = option.form.format(name=option.name, value=text)
            key, equals, rest = token.partition("=")
            options[key] = rest if equals else None
        result = Variant(variant.method, variant.source, variant.revision, sort_options(options))
        self.check(result, self.values(result))
        return result
