"""Coverage-guided fuzzing of what decodes bytes of other processes.

    make fuzz MINUTES=30           # or, from the repository's root: python -m tests.fuzz --minutes 30

`targets.py` has the targets, plain functions of bytes that raise if a promise is broken. `__main__.py` runs
them under Atheris; `test_fuzz_corpus.py` replays the inputs that it kept, in `corpus/`, with every run of
the tests.
"""
