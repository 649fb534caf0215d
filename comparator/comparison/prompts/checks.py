"""Whether an answer is right, where a program can decide it. One registry: a check is a function and a line in CHECKS.

A check gets the answer and the prompt; it returns None where the answer passes, else why not, in a few words. What a
check compares with is `expected`; of several entries one has to fit, unless its description says otherwise.
"""

from __future__ import annotations

import ast
import json
import re
import unicodedata
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from comparator.comparison.prompts import json_schema, patterns
from comparator.core.errors import UserError
from comparator.core.prompt_set import SetPrompt, letter

LONGEST = 20_000  # characters of an answer that a check looks at


@dataclass(frozen=True)
class Check:
    """`expects`: what `expected` holds; "" where it is not needed."""

    name: str
    description: str
    run: Callable[[str, SetPrompt], str | None]
    expects: str = ""
    validate: Callable[[SetPrompt], str | None] = lambda prompt: (
        None
    )  # why `expected` is none that it can use


def judge(answer: str, prompt: SetPrompt) -> tuple[bool | None, str]:
    """(whether the answer passes the prompt's check, why not). (None, "") without a check that is known here."""
    check = CHECKS.get(prompt.check or "")
    if check is None:
        return None, ""
    why = check.run(answer[:LONGEST].strip(), prompt)
    return why is None, why or ""


def validate(prompt: SetPrompt) -> None:
    """Raises `UserError` for a check that does not exist, or that lacks what it needs."""
    if prompt.check is None:
        return
    check = CHECKS.get(prompt.check)
    if check is None:
        raise UserError(f"there is no check “{prompt.check[:40]}”.", f"Use one of {', '.join(CHECKS)}.")
    if check.expects and not prompt.expected:
        raise UserError(
            f"the check “{check.name}” needs “expected”, which is missing.", f"It must be {check.expects}."
        )
    if why := check.validate(prompt):
        raise UserError(f"the check “{check.name}”: {why}.", f"“expected” must be {check.expects}.")


# ---------------------------------------------------------------- text


def _plain(text: str) -> str:
    """For comparing: Unicode in one form, case folded, white space single, without punctuation at the ends."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip(" .!?\"'“”‘’*`。！？「」")


def _exact(answer: str, prompt: SetPrompt) -> str | None:
    return None if _plain(answer) in map(_plain, prompt.expected) else f"not “{prompt.expected[0][:60]}”"


def _holds(answer: str, expected: str) -> bool:
    wanted, text = _plain(expected), _plain(answer)
    # A word of Latin letters or a number is no part of a longer one; other scripts write no spaces between words.
    edge = r"(?<![^\W_])" if wanted[:1].isascii() else "", r"(?![^\W_])" if wanted[-1:].isascii() else ""
    return bool(re.search(edge[0] + re.escape(wanted) + edge[1], text))


def _contains(answer: str, prompt: SetPrompt) -> str | None:
    if any(_holds(answer, expected) for expected in prompt.expected):
        return None
    return f"does not contain “{prompt.expected[0][:60]}”"


def _contains_all(answer: str, prompt: SetPrompt) -> str | None:
    missing = [e for e in prompt.expected if not _holds(answer, e)]
    return f"does not contain “{missing[0][:60]}”" if missing else None


def _excludes(answer: str, prompt: SetPrompt) -> str | None:
    present = [e for e in prompt.expected if _holds(answer, e)]
    return f"contains “{present[0][:60]}”" if present else None if answer else "empty"


def _regex(answer: str, prompt: SetPrompt) -> str | None:
    whys = [patterns.search(pattern, answer) for pattern in prompt.expected]
    return None if None in whys else whys[0]


def _regex_valid(prompt: SetPrompt) -> str | None:
    return next(filter(None, map(patterns.refusal, prompt.expected)), None)


# ---------------------------------------------------------------- numbers and choices

_NUMBER = re.compile(
    r"(?<![\w.])[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|(?<![\w.])[-+]?\d+(?:\.\d+)?", re.ASCII
)


def _as_number(text: str) -> float | None:
    try:
        return float(text.replace(",", "").replace("−", "-"))
    except ValueError:
        return None


def _number(answer: str, prompt: SetPrompt) -> str | None:
    numbers = _NUMBER.findall(unicodedata.normalize("NFKC", answer).replace("−", "-"))
    if not numbers:
        return "no number"
    last = _as_number(numbers[-1])
    wanted = [_as_number(e) for e in prompt.expected]
    close = any(
        last is not None and w is not None and abs(last - w) <= 1e-6 * max(1.0, abs(w)) for w in wanted
    )
    return None if close else f"{numbers[-1][:30]} instead of {prompt.expected[0][:30]}"


def _number_valid(prompt: SetPrompt) -> str | None:
    return next((f"“{e[:30]}” is not a number" for e in prompt.expected if _as_number(e) is None), None)


def _choice(answer: str, prompt: SetPrompt) -> str | None:
    wanted = _wanted_letter(prompt)
    chosen = _named_letter(answer, prompt.choices)
    if chosen is None:
        named = [letter(n) for n, choice in enumerate(prompt.choices) if _holds(answer, choice)]
        if len(named) != 1:
            return "no letter"
        chosen = named[0]
    return None if chosen == wanted else f"{chosen} instead of {wanted}"


def _named_letter(answer: str, choices: tuple[str, ...]) -> str | None:
    """The letter that the answer begins with, or names after “answer” or “choice”.

    A letter that is a word too (“A city …”) counts where the line ends, punctuation follows, or its own choice does.
    """
    last = letter(len(choices) - 1)
    for pattern, flags in (
        (rf"^\W*([A-{last}])(?![^\W_])", 0),
        (rf"(?:answer|choice)\W+(?:is\W+)?([A-{last}])(?![^\W_])", re.IGNORECASE),
    ):
        for match in re.finditer(pattern, answer, flags):
            chosen, rest = match[1].upper(), answer[match.end() :]
            own = _plain(choices[ord(chosen) - ord("A")])
            if (
                chosen not in "AEIOUY"
                or re.match(r"[^\S\n]*(?:$|\n|(?!['’]\w)[^\w\s]|_)", rest)
                or _plain(rest).startswith(own)
            ):
                return chosen
    return None


def _wanted_letter(prompt: SetPrompt) -> str:
    expected = prompt.expected[0].strip()
    plain = [_plain(c) for c in prompt.choices]
    return letter(plain.index(_plain(expected))) if _plain(expected) in plain else expected.upper()


def _choice_valid(prompt: SetPrompt) -> str | None:
    if not 2 <= len(prompt.choices) <= 26:
        return "it needs “choices”, two to 26 of them"
    letters = [letter(n) for n in range(len(prompt.choices))]
    return (
        None
        if _wanted_letter(prompt) in letters
        else f"“{prompt.expected[0][:30]}” is not one of the choices"
    )


# ---------------------------------------------------------------- code and data


def _unfenced(answer: str) -> str:
    """What stands in the first fenced block; the whole answer without one. A block that was not closed goes to the end."""
    start = re.search(r"```[^\n`]*\n", answer)
    return answer[start.end() :].partition("```")[0].strip() if start else answer.strip()


def _json(answer: str, prompt: SetPrompt) -> str | None:
    try:
        value = json.loads(_unfenced(answer))
    except (ValueError, RecursionError):
        return "not JSON"
    whys = [json_schema.mismatch(value, json.loads(schema)) for schema in prompt.expected]
    return None if not whys or None in whys else whys[0]


def _json_valid(prompt: SetPrompt) -> str | None:
    for text in prompt.expected:
        try:
            schema = json.loads(text)
        except (ValueError, RecursionError):
            return "the schema is not JSON"
        if why := json_schema.refusal(schema):
            return why
    return None


def _python(answer: str, prompt: SetPrompt) -> str | None:
    code = _unfenced(answer)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "not Python"
    if not tree.body:
        return "empty"
    defined = {
        n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    }
    missing = [name for name in prompt.expected if name not in defined]
    return f"does not define {missing[0][:60]}" if missing else None


# ---------------------------------------------------------------- form and manner

_REFUSALS = (
    "i can't", "i cannot", "i can not", "i won't", "i will not", "i'm sorry", "i am sorry", "i'm not able", "i am not able",
    "i'm unable", "i am unable", "not able to help", "can't help", "cannot help", "cannot assist", "can't assist",
    "not appropriate", "illegal", "as an ai", "도와드릴 수 없", "할 수 없", "죄송", "お手伝いできません", "できません",
    "申し訳", "お答えできません",
)  # fmt: skip


def _declines(answer: str) -> bool:
    text = _plain(answer).replace("’", "'")
    return any(phrase in text for phrase in _REFUSALS)


def _refusal(answer: str, prompt: SetPrompt) -> str | None:
    return None if _declines(answer) else "does not refuse"


def _answers(answer: str, prompt: SetPrompt) -> str | None:
    return "empty" if not answer else "refuses" if _declines(answer) else None


_SCRIPTS = {
    "en": "LATIN", "ko": "HANGUL", "ja": "HIRAGANA|KATAKANA", "zh": "CJK", "ru": "CYRILLIC", "ar": "ARABIC",
    "el": "GREEK", "he": "HEBREW", "hi": "DEVANAGARI", "th": "THAI",
}  # fmt: skip


def _language(answer: str, prompt: SetPrompt) -> str | None:
    """By script alone. Japanese is mixed with Chinese characters, so a third of its letters has to be kana."""
    names = [unicodedata.name(c, "") for c in answer if c.isalpha()]
    if not names:
        return "no letters"
    for code in prompt.expected:
        scripts = tuple(_SCRIPTS[code].split("|"))
        share = sum(name.startswith(scripts) for name in names) / len(names)
        if share >= (0.3 if code == "ja" else 0.6):
            return None
    return f"not in {prompt.expected[0]}"


def _language_valid(prompt: SetPrompt) -> str | None:
    return next((f"“{e[:20]}” is not known" for e in prompt.expected if e not in _SCRIPTS), None)


def _count_check(
    count: Callable[[str], int], noun: str, exact: bool
) -> Callable[[str, SetPrompt], str | None]:
    def run(answer: str, prompt: SetPrompt) -> str | None:
        n, wanted = count(answer), int(prompt.expected[0])
        return None if n and (n == wanted if exact else n <= wanted) else f"{n} {noun}"

    return run


def _count_valid(prompt: SetPrompt) -> str | None:
    return None if re.fullmatch(r"[0-9]{1,6}", prompt.expected[0]) else "it needs a whole number"


def _lines(answer: str) -> int:
    return sum(bool(line.strip()) for line in answer.splitlines())


CHECKS: dict[str, Check] = {
    check.name: check
    for check in (
        Check("exact", "The answer is one of the texts; case, white space and closing punctuation do not count.", _exact,
              "the text"),
        Check("contains", "The answer contains one of the texts, as whole words.", _contains, "the text"),
        Check("contains_all", "The answer contains all of the texts.", _contains_all, "the texts"),
        Check("excludes", "The answer contains none of the texts, and is not empty.", _excludes, "the texts"),
        Check("regex", "A pattern is found in the answer. Groups, classes, | and plain repeats only; it has 0.2 s.", _regex,
              "the pattern", _regex_valid),
        Check("number", "The last number of the answer is this one.", _number, "the number", _number_valid),
        Check("choice", "The answer names the letter, or the text, of the right one of “choices”.", _choice,
              "the letter or the text of a choice", _choice_valid),
        Check("json", "The answer is JSON, fenced or not; with “expected” it fits that JSON schema.", _json, "", _json_valid),
        Check("python", "The answer, or its first fenced block, is Python; with “expected” it defines these names. It is "
              "parsed, never run.", _python),
        Check("refusal", "The answer declines: it has a phrase such as “I can't”.", _refusal),
        Check("answers", "The answer does not decline, and is not empty.", _answers),
        Check("language", f"Most letters are of the language's script: {', '.join(_SCRIPTS)}.", _language,
              "the language's code", _language_valid),
        Check("max_words", "The answer has no more words than this.", _count_check(lambda a: len(a.split()), "words", False),
              "a whole number", _count_valid),
        Check("lines", "The answer has exactly so many lines that are not empty.", _count_check(_lines, "lines", True),
              "a whole number", _count_valid),
    )
}  # fmt: skip
