"""Regular expressions over names mean what they mean to `re`, and none takes long."""

import itertools
import re
import time

import pytest

from sparsify.regular_expression import MAX_LETTERS, compile_expression

EXPRESSIONS = (
    *("", "a|b|cd", "^a$", r"\Aa{2}", r"(?s).{0,2}\Z", "[^a]{2,3}", "a+?b", "x*", "(|a)+b", "(a*)*b?", "(a{0,2}){2}"),
    *(r"\w+\.\d+", "(a|ab)(c|bcd)*", r"((a|\b)b?){3,5}", r"\ba\b.*", "(?i:A[b-c1])", "(?i)AB", "(?x) a b # c"),
    *("(?=.*b)a.*(?<!c)", "(?!.*(ab|cd)).*", "(?<=a)b|ab", "(?<!a)b", "(?P<name>a)+"),
)


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_an_expression_matches_what_re_matches(text: str) -> None:
    names = ["".join(letters) for n in range(5) for letters in itertools.product("abcd.1", repeat=n)]
    matches = compile_expression(text)
    assert [name for name in names if matches(name)] == [name for name in names if re.fullmatch(text, name)]


@pytest.mark.parametrize(
    "text",
    [
        "(a+)+b",
        "(a*)*b",
        "(a|a)*b",
        "(a|aa)+b",
        ".*" * 100 + "b",
        "(.*a){25}b",
        "(?=(a+)+b)a*",
        "(a{0,60000}){0,60000}b",
    ],
)
def test_an_expression_that_re_would_try_for_years_is_done_at_once(text: str) -> None:
    started = time.process_time()
    assert not compile_expression(text)("a" * 100)
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(", "'\\(' is no valid regular expression: missing \\)"),
        ("a{99999999999}", "no valid regular expression: the repetition number is too large"),
        ("(" * 5000 + ")" * 5000, "too many brackets in brackets"),
        ("a" * (MAX_LETTERS + 1), f"of {MAX_LETTERS + 1} letters, and {MAX_LETTERS} are the most"),
        ("(a)\\1", "has a part that is not read here: backreference"),
        ("(a)(?(1)b|c)", "not read here: conditional group"),
        ("(?>a)", "not read here: atomic group"),
        ("a*+", "not read here: possessive quantifier"),
    ],
)
def test_an_expression_that_is_not_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_expression(text)
