"""phrase_scores under pytest-benchmark: conftest.py says how to run this and what it gives."""


def test_bench(title, label, time_contestant):
    time_contestant(title, label)
