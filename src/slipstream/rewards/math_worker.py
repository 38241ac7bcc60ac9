"""A child process that parses and compares mathematics, with a deadline that the kernel keeps.

Run as a script (never imported by the package): `python -P math_worker.py`. It reads one JSON list a line from standard
input, `[seconds, gold]` or `[seconds, gold, text]`, and answers with one JSON value a line: whether the gold answer can
be parsed, or `[right, what was extracted from the text]`.

SIGPROF keeps its default action, so a request that takes longer than its seconds ends this process even in the middle
of a C function that never looks at Python's signals (a huge integer power). They are seconds of this process on a
core: on a busy machine no answer is wrong for having had to wait. End of input ends it as well, so it does not outlive
whoever started it.
"""

import json
import os
import resource
import signal
from functools import lru_cache

MEMORY_BYTES = 4 << 30  # A power tower should fail with MemoryError and not take the machine's memory.


def main() -> None:
    # Parsers print: answers go through a private copy of standard output, whatever else is printed goes nowhere.
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    requests = os.fdopen(os.dup(0), "r", encoding="ascii")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; end of input is for us.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})  # Masks are inherited.
    verifier = make_verifier()
    verifier("$1+1$", r"\boxed{2}")  # The first takes 0.2 s longer than others, of nobody's limit.
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in requests:
        seconds, *question = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        answer = verifier(*question)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), file=answers, flush=True)


def make_verifier():
    """Import math-verify (0.4 s) and return `verify(gold[, text])`."""
    import logging

    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # It warns that its own timeouts are off.
    # An answer must be LaTeX (boxed, or between dollars); a box wins over other mathematics in the text.
    latex = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True),
        boxed_match_priority=0,
        try_extract_without_anchor=False,
    )

    @lru_cache(maxsize=8192)
    def parse_gold(gold: str):
        return parse(gold, parsing_timeout=None)

    def check(gold: str, text: str | None = None):
        expected = parse_gold(gold)
        if text is None:
            return bool(expected)
        found = parse(text, [latex], extraction_mode="first_match", parsing_timeout=None)
        # The last element is the extracted string itself: printing an expression can take forever.
        shown = found[-1] if found and isinstance(found[-1], str) else None
        return bool(verify(expected, found, timeout_seconds=None)), shown

    return check


if __name__ == "__main__":
    main()
